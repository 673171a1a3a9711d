"""DIALSTM against published counts, torch.nn.LSTMCell and a step-by-step reference."""

import numpy as np
import pytest
import torch

from dia_diffusion.attention import DIALSTM
from tests.attention.networks import count

CELLS = ("dia-lstm", "dia-lstm-light", "lstm")


@pytest.mark.parametrize("n", [16, 64, 512])
@pytest.mark.parametrize("r", [1, 4, 16])
def test_parameter_counts_match_the_paper(n: int, r: int) -> None:
    assert count(DIALSTM(n, r, "lstm")) == 8 * n * n + 8 * n
    assert count(DIALSTM(n, r, "dia-lstm")) == 10 * n * n // r + 2 * n // r + 8 * n
    assert count(DIALSTM(n, r, "dia-lstm-light")) == 2 * n * n // r + 2 * n // r + 16 * n
    stacked = count(DIALSTM(n, r, "dia-lstm", num_cells=3))
    assert stacked == 10 * n * n // r + 2 * n // r + 8 * n + 2 * (8 * n * n + 8 * n)


def test_lstm_is_torchs_lstm_cell_with_gradients() -> None:
    torch.manual_seed(0)
    unit, cell = DIALSTM(12, cell="lstm"), torch.nn.LSTMCell(12, 12)
    gates = unit.cells[0]
    with torch.no_grad():
        cell.weight_ih.copy_(gates.from_input.weight)
        cell.weight_hh.copy_(gates.from_hidden.weight)
        cell.bias_ih.copy_(gates.from_input.bias)
        cell.bias_hh.copy_(gates.from_hidden.bias)
    features = torch.randn(4, 3, 5, 12)  # 4 blocks
    state, expected_state = None, None
    total, expected_total = torch.zeros(()), torch.zeros(())
    for block in features:
        recalibrated, state = unit(block, state)
        expected_state = cell(block.mean(1), expected_state)
        assert torch.allclose(state[0][0], expected_state[0], atol=1e-6)
        assert torch.allclose(recalibrated, block * expected_state[0][:, None], atol=1e-6)
        total = total + recalibrated.square().sum()
        expected_total = expected_total + (block * expected_state[0][:, None]).square().sum()
    total.backward()
    expected_total.backward()
    assert torch.allclose(gates.from_input.weight.grad, cell.weight_ih.grad, rtol=1e-4, atol=1e-5)
    assert torch.allclose(gates.from_hidden.weight.grad, cell.weight_hh.grad, rtol=1e-4, atol=1e-5)


def sigmoid(value: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-value))


def reference_blocks(unit: DIALSTM, cell: str, activation: str, r: int, blocks: np.ndarray) -> np.ndarray:
    """Attention maps (T, B, N) from the weights alone (eq. 4 and 5)."""
    weights = {name: value.detach().double().numpy() for name, value in unit.cells[0].named_parameters()}
    output_activation = {"sigmoid": sigmoid, "tanh": np.tanh, "relu": lambda value: np.maximum(value, 0)}[activation]
    h = c = np.zeros((blocks.shape[1], blocks.shape[3]))
    maps = []
    for y in blocks.mean(axis=2):  # (B, N)
        gates = 0
        for source, vector in (("input", y), ("hidden", h)):
            reduced = vector @ weights[f"reduce_{source}.weight"].T + weights[f"reduce_{source}.bias"]
            squeezed = np.maximum(reduced, 0)  # (B, N/r)
            if cell == "dia-lstm":
                gates += squeezed @ weights[f"expand_{source}.weight"].T + weights[f"expand_{source}.bias"]
            else:
                gates += np.tile(squeezed, 4 * r) * weights[f"{source}_weight"] + weights[f"{source}_bias"]
        i, f, g, o = np.split(gates, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * output_activation(c)
        maps.append(h)
    return np.stack(maps)


@pytest.mark.parametrize("cell", ["dia-lstm", "dia-lstm-light"])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
def test_step_by_step_reference(cell: str, activation: str) -> None:
    torch.manual_seed(1)
    unit = DIALSTM(8, reduction=2, cell=cell, activation=activation)
    blocks = torch.randn(5, 2, 3, 8)
    expected = reference_blocks(unit, cell, activation, 2, blocks.double().numpy())
    state = None
    for block, attention_map in zip(blocks, expected, strict=True):
        recalibrated, state = unit(block, state)
        assert np.allclose(state[0][-1].detach().numpy(), attention_map, atol=1e-6)
        assert np.allclose(recalibrated.detach().numpy(), block.numpy() * attention_map[:, None], atol=1e-5)


def test_stacked_cells_run_on_the_hidden_state_below() -> None:
    torch.manual_seed(2)
    unit = DIALSTM(8, cell="lstm", num_cells=2)
    stacked = torch.nn.LSTM(8, 8, num_layers=2)
    with torch.no_grad():
        for layer, gates in enumerate(unit.cells):
            getattr(stacked, f"weight_ih_l{layer}").copy_(gates.from_input.weight)
            getattr(stacked, f"weight_hh_l{layer}").copy_(gates.from_hidden.weight)
            getattr(stacked, f"bias_ih_l{layer}").copy_(gates.from_input.bias)
            getattr(stacked, f"bias_hh_l{layer}").copy_(gates.from_hidden.bias)
    blocks = torch.randn(4, 3, 5, 8)
    expected, _ = stacked(blocks.mean(2))
    state = None
    for block, hidden in zip(blocks, expected, strict=True):
        _, state = unit(block, state)
        assert torch.allclose(state[0][-1], hidden, atol=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_zero_initialization_starts_every_block_at_a_quarter(cell: str) -> None:
    """The gradient of h still reaches the parameters that feed the gates."""
    unit = DIALSTM(8, cell=cell, activation="sigmoid", num_cells=2, initialization="zero")
    state, features = None, torch.randn(3, 2, 5, 8)
    for block in features:
        recalibrated, state = unit(block, state)
        assert torch.equal(recalibrated, 0.25 * block)
    recalibrated.sum().backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in unit.cells[1].parameters())


@pytest.mark.parametrize("cell", CELLS)
def test_scale_multiplies_the_map_and_not_the_state(cell: str) -> None:
    torch.manual_seed(6)
    plain = DIALSTM(8, cell=cell)
    torch.manual_seed(6)
    scaled = DIALSTM(8, cell=cell, scale=4)
    states = [None, None]
    for block in torch.randn(3, 2, 5, 8):
        (expected, states[0]), (recalibrated, states[1]) = plain(block, states[0]), scaled(block, states[1])
        assert torch.allclose(recalibrated, 4 * expected, rtol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
        assert torch.equal(block * scaled.attention_map(states[1])[:, None], recalibrated)


def test_light_weights_start_with_the_variance_of_the_map_they_replace() -> None:
    torch.manual_seed(4)
    n, r = 4096, 4
    light = DIALSTM(n, r, "dia-lstm-light").cells[0]
    linear = torch.nn.Linear(n // r, 64)
    assert light.input_weight.abs().max() <= 1
    # A sum over n / r weights of variance v, against one weight.
    variance = float(linear.weight.detach().var())
    assert float(light.input_weight.detach().var()) == pytest.approx(n / r * variance, rel=0.05)
    assert float(light.input_bias.detach().var()) == pytest.approx(r / n / 3, rel=0.05)
