"""Lines for GELU against numpy's least squares, and networks whose MLPs are known to be linear."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dia_diffusion import UViT
from dia_diffusion.analysis.ablations import losses
from dia_diffusion.analysis.linearity import LineFit, at_activations, linearity_of_run, lines_instead
from dia_diffusion.analysis.run import Coverage, TrainedRun, open_runs
from dia_diffusion.analysis.stages import uvit_blocks

SMALL = {"sample_size": 8, "patch_size": 2, "hidden_size": 32, "num_layers": 3, "num_attention_heads": 4}


def test_lines_are_least_squares() -> None:
    torch.manual_seed(0)
    model = UViT(**SMALL, attention=None).eval()
    random = np.random.default_rng(0)
    inputs = random.normal(random.normal(size=(3, 1, 1, 128)), 2.0, size=(3, 6, 5, 128))  # blocks, B, L, H
    outputs = F.gelu(torch.from_numpy(inputs)).numpy()
    fit = LineFit(model)
    for block, image in np.ndindex(3, 6):  # added image by image
        fit.add(block, *(torch.from_numpy(values[block, image : image + 1]) for values in (inputs, outputs)))
    intercepts, slopes = fit.lines()
    summary = fit.summary()
    left, whole = np.zeros(3), np.zeros(3)
    for block in range(3):
        for unit in range(128):
            x, y = (values[block, :, :, unit].ravel() for values in (inputs, outputs))
            (a, b), residual, _, _ = np.linalg.lstsq(np.stack([np.ones_like(x), x], axis=1), y)
            assert (float(intercepts[block, unit]), float(slopes[block, unit])) == pytest.approx((a, b), rel=1e-5)
            left[block] += residual[0]
            whole[block] += np.square(y - y.mean()).sum()
    assert summary["explained_by_block"] == pytest.approx(list(1 - left / whole))
    assert summary["explained"] == pytest.approx(1 - left.sum() / whole.sum())
    deviations = np.sqrt(inputs.reshape(3, 30, 128).var(axis=1).mean(axis=1))
    assert summary["input_deviation_by_block"] == pytest.approx(list(deviations))


def test_a_unit_that_never_changes_is_a_constant() -> None:
    fit = LineFit(UViT(**SMALL, attention=None))
    for block in range(3):
        x = torch.randn(4, 5, 128)
        x[..., 0] = 1.0
        fit.add(block, x, F.gelu(x))
    intercepts, slopes = fit.lines()
    assert torch.allclose(intercepts[:, 0] + slopes[:, 0], F.gelu(torch.ones(3)))
    assert 0 < fit.summary()["explained"] < 1


@torch.no_grad()
def test_gelu_is_what_is_seen_and_replaced() -> None:
    torch.manual_seed(0)
    model = UViT(**SMALL, attention="dia-lstm").eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    before = model(x, t).sample
    seen = []
    with at_activations(model, lambda block, given, returned: seen.append((block, given, returned))):
        assert torch.equal(model(x, t).sample, before)
    assert [block for block, _, _ in seen] == [0, 1, 2]
    for _, given, returned in seen:
        assert given.shape == (2, 17, 128) and torch.equal(F.gelu(given), returned)
    a, b = torch.randn(3, 128), torch.randn(3, 128)
    with at_activations(model, lines_instead(a, b)):
        replaced = model(x, t).sample
    assert torch.equal(model(x, t).sample, before)
    for index, block in enumerate(uvit_blocks(model)):  # a + b x as weights of a linear map of what fc1 is given
        one, two = block.mlp.fc1, block.mlp.fc2
        weight = two.weight @ (b[index][:, None] * one.weight)
        bias = two.bias + two.weight @ (a[index] + b[index] * one.bias)
        block.mlp.forward = lambda x, weight=weight, bias=bias: F.linear(x, weight, bias)
    assert torch.allclose(model(x, t).sample, replaced, atol=1e-4)


def with_inputs_scaled(run: TrainedRun, factor: float) -> TrainedRun:
    """The run with weights whose GELUs are fed so much less or more."""
    model = run.model(6)
    for block in uvit_blocks(model):
        block.mlp.fc1.weight.data *= factor
        block.mlp.fc1.bias.data *= factor
        block.mlp.fc2.weight.data *= 30 / factor  # six steps of training leave the MLPs without effect on the loss
    model.decoder.weight.data *= 30
    run.model = lambda step: model
    return run


def test_tiny_inputs_are_linear_and_large_ones_are_not(tiny_run: Callable[[str], Path]) -> None:
    records = {}
    for factor in (1e-3, 30.0):
        (run,) = open_runs([tiny_run("none")])
        run = with_inputs_scaled(run, factor)
        (records[factor],) = linearity_of_run(run, [6], Coverage(8, 3, seed=1))["steps"]
        own = losses(run, run.model(6), run.draw(1, 1, 8), Coverage(8, 3))
        assert records[factor]["losses"]["own"]["loss"] == pytest.approx(float(own.mean()))
    tiny, large = records[1e-3], records[30.0]
    assert min(tiny["explained_by_block"]) > 0.99999 and max(large["explained_by_block"]) < 0.95
    lines = "lines for GELU"
    assert abs(tiny["losses"][lines]["difference"]) < 1e-4 * tiny["losses"]["own"]["loss"]
    assert abs(large["losses"][lines]["difference"]) > 1e-3 * large["losses"]["own"]["loss"]
    ratios = np.divide(large["input_deviation_by_block"], tiny["input_deviation_by_block"])
    assert ratios[0] == pytest.approx(30.0 / 1e-3, rel=1e-3)  # of the first block, whose features are the same
