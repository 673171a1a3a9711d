"""The controls against loops over blocks and channels, and in the places where a DIA-LSTM stands."""

import copy
from pathlib import Path

import pytest
import torch

from dia_diffusion import UViT
from dia_diffusion.attention import build_attention
from dia_diffusion.errors import InputError

CONTROLS = ("fixed-scale", "block-scale", "block-channels")
COUNTS = {"fixed-scale": 0, "block-scale": 3, "block-channels": 3 * 32}
SMALL = {"sample_size": 8, "patch_size": 2, "hidden_size": 32, "num_layers": 3, "num_attention_heads": 4}


def scrambled(name: str, **kwargs: object) -> UViT:
    """A UViT whose control no longer stands where it starts."""
    torch.manual_seed(0)
    model = UViT(**SMALL, attention=name, **kwargs)
    for parameter in model.unit.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("name", CONTROLS)
def test_each_block_has_its_own_scale(name: str) -> None:
    torch.manual_seed(0)
    unit = build_attention(name, 6, num_blocks=3)
    for parameter in unit.parameters():
        torch.nn.init.normal_(parameter)
    learned = [parameter.detach().expand(3, 6) for parameter in unit.parameters()]
    (expected,) = learned or [torch.full((3, 6), 0.25)]
    state = None
    for block in range(3):
        features = torch.randn(2, 4, 6)
        recalibrated, state = unit(features, state, 1)
        for k in range(6):
            assert torch.allclose(recalibrated[..., k], features[..., k] * expected[block, k])
        assert torch.equal(unit.attention_map(state).expand(6), expected[block])


@pytest.mark.parametrize("name", CONTROLS)
def test_they_start_where_dia_lstm_does_unless_told(name: str) -> None:
    features = torch.randn(2, 4, 6)
    zero, _ = build_attention("dia-lstm", 6, reduction=2, initialization="zero")(features)
    assert torch.equal(build_attention(name, 6, num_blocks=3)(features)[0], zero)
    option = "scale" if name == "fixed-scale" else "start"
    assert torch.equal(build_attention(name, 6, num_blocks=3, **{option: 1})(features)[0], features)


@pytest.mark.parametrize("name", ["block-scale", "block-channels"])
def test_weight_decay_pulls_scales_to_where_it_is_said(name: str) -> None:
    for decay_to in (0.0, 1.0):
        unit = build_attention(name, 6, num_blocks=3, start=1.5, decay_to=decay_to)
        assert torch.equal(unit.attention_map(2), torch.full_like(unit.attention_map(2), 1.5))
        optimizer = torch.optim.AdamW(unit.parameters(), lr=0.1, weight_decay=0.5)
        for _ in range(3):  # without a gradient, only the decay moves the parameters
            unit.scale.grad = torch.zeros_like(unit.scale)
            optimizer.step()
        expected = decay_to + (1.5 - decay_to) * 0.95**3
        assert torch.allclose(unit.attention_map(2), torch.tensor(expected), rtol=1e-6)


@pytest.mark.parametrize("name", CONTROLS)
def test_maps_and_tokens_agree(name: str) -> None:
    unit = build_attention(name, 8, num_blocks=2)
    maps = torch.randn(2, 8, 4, 3)
    for parameter in unit.parameters():
        torch.nn.init.normal_(parameter)
    by_token, _ = unit(maps.flatten(2).transpose(1, 2))
    assert torch.equal(unit(maps)[0].flatten(2).transpose(1, 2), by_token)


@pytest.mark.parametrize("name", CONTROLS)
def test_parameter_counts(name: str) -> None:
    model = UViT(**SMALL, attention=name)
    plain = sum(parameter.numel() for parameter in UViT(**SMALL, attention=None).parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == plain + COUNTS[name]


@pytest.mark.parametrize("name", CONTROLS)
def test_precision_is_that_of_the_features(name: str) -> None:
    model = scrambled(name)
    x = torch.randn(2, 3, 8, 8)
    exact = model(x, 300).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x, 300).sample
    assert (low.float() - exact).abs().max() < 0.05 * exact.abs().max()
    cast = copy.deepcopy(model).to(torch.bfloat16)
    assert cast(x.bfloat16(), 300).sample.dtype == torch.bfloat16
    # As under autocast, where the unit's own parameters are float32 and what it is given needn't be.
    unit = model.unit
    assert unit(torch.randn(2, 4, 32).bfloat16())[0].dtype == torch.bfloat16


LONG_BUT_LAST = [*(pytest.param(name, marks=pytest.mark.long) for name in CONTROLS[:-1]), CONTROLS[-1]]


@pytest.mark.parametrize("name", LONG_BUT_LAST)
def test_compiled_it_is_the_same_function_with_the_same_gradients(name: str) -> None:
    model = scrambled(name)
    # The graph of the whole network in one piece, without an optimizing backend, which would need a C compiler.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8, 8)
    gradients = []
    for network in (model, compiled):
        model.zero_grad()
        network(x, torch.tensor([3.0, 500.0])).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", CONTROLS)
def test_saved_and_loaded_it_is_the_same_function(name: str, tmp_path: Path) -> None:
    option = "scale" if name == "fixed-scale" else "start"
    model = scrambled(name, attention_kwargs={option: 0.75}).eval()
    model.save_pretrained(tmp_path)
    loaded = UViT.from_pretrained(tmp_path)
    assert loaded.config.attention_kwargs == {option: 0.75}
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(x, 5).sample, loaded(x, 5).sample)


def test_more_blocks_than_it_has_are_refused() -> None:
    unit = build_attention("block-scale", 4, num_blocks=2)
    state = None
    for _ in range(2):
        _, state = unit(torch.randn(1, 3, 4), state)
    with pytest.raises(InputError, match="must be 2 at most, got call 3"):
        unit(torch.randn(1, 3, 4), state)


@pytest.mark.parametrize(
    ("name", "kwargs", "named"),
    [
        (
            "block-channels",
            {"num_blocks": 2, "decay_to": float("inf")},
            "`decay_to` .* must be a finite number, got inf",
        ),
        ("block-channels-time", {}, "`num_blocks` must be given"),
        ("block-channels-time", {"num_blocks": 2, "reduction": 3}, "`reduction` must divide the 8 channels, got 3"),
        ("block-scale", {}, "`num_blocks` must be given"),
        ("block-scale", {"num_blocks": 2, "start": "half"}, "`start` .* must be a finite number, got 'half'"),
        ("block-channels", {"num_blocks": 2, "start": float("nan")}, "must be a finite number, got nan"),
        ("block-channels", {"num_blocks": 2, "by_channel": False}, "`by_channel` is set by"),
        ("fixed-scale", {"scale": True}, "must be a finite number, got True"),
        ("fixed-scale", {"start": 1}, "can't be built"),
        ("dia-lstm", {"scale": "x"}, "must be a finite number, got 'x'"),
        ("dia-lstm", {"initialization": "one"}, "must be one of torch, zero, got 'one'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(name: str, kwargs: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        build_attention(name, 8, **kwargs)


def test_what_the_model_decides_is_no_argument_of_its_unit() -> None:
    for decided in ("num_blocks", "channels", "name"):
        with pytest.raises(InputError, match=f"`attention_kwargs` must not have {decided}"):
            UViT(**SMALL, attention="block-scale", attention_kwargs={decided: 3})
