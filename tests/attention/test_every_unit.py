"""Guarantees of every unit: precision, saving, recomputation, compilation, feature layouts and argument checks."""

import copy
from pathlib import Path

import pytest
import torch

from dia_diffusion import UViT
from dia_diffusion.attention import DIALSTM, UNITS, build_attention
from dia_diffusion.errors import InputError
from tests.attention.networks import SAMS

BLIND = ("fixed-scale", "block-scale", "block-channels", "block-channels-time")  # controls: they read no features
WITHOUT_TIME = [name for name in UNITS if name != "block-channels-time"]
OPTIONS = [
    *((name, {}) for name in UNITS),
    *((name, {"sharing": "individual"}) for name in SAMS),
    ("cbam", {"spatial_norm": True}),
    ("cbam", {"spatial_norm": True, "sharing": "individual"}),
    ("fixed-scale", {"scale": 0.75}),
    ("block-channels", {"start": 0.75, "decay_to": 1.0}),
    ("dia-lstm", {"reduction": 8, "num_cells": 2}),
]
SMALL = {"sample_size": 8, "patch_size": 2, "hidden_size": 16, "num_layers": 3, "num_attention_heads": 4}
X, T = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 3.3, 500.0, 999.0])


def scrambled(unit: torch.nn.Module) -> torch.nn.Module:
    """Randomizes parameters and running statistics."""
    for parameter in unit.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for name, buffer in unit.named_buffers():
        if buffer.is_floating_point():
            torch.nn.init.uniform_(buffer, 0.5 if "var" in name else -1.0, 2.0)
    return unit


def uvit_with(name: str, options: dict) -> UViT:
    torch.manual_seed(0)
    model = UViT(**SMALL, attention=name, attention_kwargs=options)
    scrambled(model.unit)
    return model


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_saving_and_loading_keep_the_outputs(name: str, options: dict, tmp_path: Path) -> None:
    model = uvit_with(name, options).eval()
    model.save_pretrained(tmp_path)
    loaded = UViT.from_pretrained(tmp_path)
    assert loaded.config.attention_kwargs == options
    with torch.no_grad():
        assert torch.equal(model(X, T).sample, loaded(X, T).sample)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_features_keep_their_precision_and_maps_are_float32(name: str, options: dict) -> None:
    model = uvit_with(name, options)
    exact = model(X, T).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(X, T).sample
    low.sum().backward()
    assert (low.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.unit.parameters())
    half = copy.deepcopy(model).to(torch.bfloat16).eval()
    assert half(X.bfloat16(), T).sample.dtype == torch.bfloat16
    start = model.unit.first_state(torch.randn(4, 16)) if UNITS[name].needs_time else None
    features = torch.randn(4, 17, 16)
    for unit in (model.unit.eval(), half.unit):
        recalibrated, state = unit(features.bfloat16(), start, 0, 1)
        assert recalibrated.dtype == torch.bfloat16
        assert (unit is half.unit and name in BLIND) or unit.attention_map(state).dtype == torch.float32
    # Autocast doesn't reach the unit's own layers.
    expected, _ = model.unit(features, start, 0, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.unit(features, start, 0, 1)[0], expected)


# Compiling takes seconds: only the units with the most to trace are compiled.
WAYS = [("checkpointed", *case) for case in OPTIONS if "sharing" not in case[1]]
WAYS += [
    ("compiled", name, options) for name, options in (("block-channels-time", {}), ("cbam", {"spatial_norm": True}))
]
WAYS += [("compiled and checkpointed", "srm", {})]


@pytest.mark.parametrize(("how", "name", "options"), WAYS)
def test_checkpointing_and_compiling_keep_the_gradients(how: str, name: str, options: dict) -> None:
    torch._dynamo.reset()
    model = uvit_with(name, options)
    twin = copy.deepcopy(model)
    if "checkpointed" in how:
        model.enable_gradient_checkpointing()
    # As one graph, without an optimizing backend, which needs a C compiler; recomputation needs a traced backward.
    backend = "aot_eager" if "checkpointed" in how else "eager"
    run = torch.compile(model, fullgraph=True, backend=backend) if "compiled" in how else model
    for network in (run, twin):
        network(X, T).sample.square().mean().backward()
    for (key, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        close = {"rtol": 1e-4, "atol": 1e-6} if "compiled" in how else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(ours.grad, theirs.grad, **close, msg=key)
    # A batch that is computed twice updates the running statistics once.
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


@pytest.mark.parametrize("name", WITHOUT_TIME)
def test_tokens_are_maps_in_another_order(name: str) -> None:
    torch.manual_seed(1)
    unit = scrambled(build_attention(name, 16, num_blocks=1).double()).eval()
    maps = torch.randn(3, 16, 5, 5, dtype=torch.float64)
    leading = torch.randn(3, 2, 16, dtype=torch.float64)
    tokens = torch.cat([leading, maps.flatten(2).transpose(1, 2)], dim=1)
    of_maps, _ = unit(maps)
    of_tokens, state = unit(tokens, None, 2, 2)
    torch.testing.assert_close(of_tokens[:, 2:], of_maps.flatten(2).transpose(1, 2))
    channels = state[1] if name == "cbam" else unit.attention_map(state)
    expected = leading if name == "sge" else leading * channels.expand(3, 16)[:, None]  # spatial maps don't scale them
    torch.testing.assert_close(of_tokens[:, :2], expected, check_dtype=False)


@pytest.mark.parametrize("name", WITHOUT_TIME)
def test_leading_tokens_are_pooled_only_where_asked(name: str) -> None:
    torch.manual_seed(2)
    unit = scrambled(build_attention(name, 64, num_blocks=1).double()).eval()
    tokens = torch.randn(3, 26, 64, dtype=torch.float64)
    other = tokens.clone()
    other[:, 0] += 10
    patches = [[unit(x, None, unpooled, 1)[0][:, 1:] for x in (tokens, other)] for unpooled in (0, 1)]
    assert torch.equal(*patches[1])
    # SPA and SGE compute statistics of patches only.
    assert torch.equal(*patches[0]) == (name in ("spa", "sge", *BLIND))


@pytest.mark.parametrize(
    ("name", "options"),
    [("se", {"sharing": "individual"}), ("srm", {}), ("block-scale", {}), ("block-channels-time", {})],
)
def test_more_calls_than_blocks_are_refused(name: str, options: dict) -> None:
    unit = build_attention(name, 16, num_blocks=2, **options).eval()
    state = unit.first_state(torch.zeros(1, 16)) if UNITS[name].needs_time else None
    for _ in range(2):
        _, state = unit(torch.randn(1, 3, 16), state)
    with pytest.raises(InputError, match="must be 2 at most, got call 3"):
        unit(torch.randn(1, 3, 16), state)


def test_units_are_built_by_name() -> None:
    assert build_attention(None, 8) is None and build_attention("none", 8) is None
    assert isinstance(build_attention("lstm", 8, num_cells=2), DIALSTM)
    with pytest.raises(InputError, match="must be named for the arguments reduction"):
        build_attention(None, 8, reduction=2)
    with pytest.raises(InputError, match="features must have shape"):
        DIALSTM(8)(torch.randn(2, 8))
    for decided in ("num_blocks", "channels", "name"):
        with pytest.raises(InputError, match=f"`attention_kwargs` must not have {decided}"):
            UViT(**SMALL, attention="block-scale", attention_kwargs={decided: 3})


@pytest.mark.parametrize("name", ["cbam", "spa", "sge"])
def test_tokens_that_form_no_square_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"must form a square grid .*, got 12 tokens after 1 prefix tokens"):
        build_attention(name, 16)(torch.randn(2, 13, 16), None, 0, 1)


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("dia", {}, "must be none or one of dia-lstm"),
        ("dia-lstm", {"reduction": 5}, "`reduction` must divide the 16 channels, got 5"),
        ("dia-lstm", {"width": 3}, "can't be built"),
        ("dia-lstm", {"activation": "gelu"}, "must be one of sigmoid, tanh, relu"),
        ("dia-lstm", {"scale": "x"}, "must be a finite number, got 'x'"),
        ("dia-lstm", {"initialization": "one"}, "must be one of torch, zero, got 'one'"),
        ("dia-lstm", {"num_cells": 0}, "`num_cells` must be 1 or more, got 0"),
        ("dia-lstm", {"sharing": "individual"}, "`sharing` must be shared for dia-lstm, .*, got 'individual'"),
        ("lstm", {"sharing": "individual"}, "`sharing` must be shared for lstm"),
        ("dia-lstm-identity", {"scale": 1}, "`scale` is set by"),
        ("dia-lstm-light-identity", {"cell": "lstm"}, "`cell` is set by"),
        ("se", {"reduction": 5}, "`reduction` must divide the 16 channels, got 5"),
        ("se", {"sharing": "both"}, "`sharing` must be one of shared, individual, got 'both'"),
        ("se", {"sharing": "individual"}, "`num_blocks` must be 1 or more .*, got None"),
        ("se", {"share_norm": True}, "must be false for a unit without BatchNorm"),
        ("se", {"module": None}, "`module` is set by"),
        ("eca", {"kernel_size": 4}, "`kernel_size` must be odd, .*, got 4"),
        ("sge", {"groups": 5}, "`groups` must divide the 16 channels, got 5"),
        ("spa", {"pools": 3}, "can't be built: .*pools"),
        ("srm", {}, "`num_blocks` must be 1 or more"),
        ("srm", {"share_norm": True, "sharing": "individual", "num_blocks": 2}, "be false with individual sharing"),
        ("srm", {"share_norm": "no", "num_blocks": 2}, "`share_norm` must be true or false, got 'no'"),
        ("fixed-scale", {"scale": True}, "must be a finite number, got True"),
        ("fixed-scale", {"start": 1}, "can't be built"),
        ("block-scale", {}, "`num_blocks` must be given"),
        ("block-scale", {"num_blocks": 2, "start": "half"}, "`start` .* must be a finite number, got 'half'"),
        ("block-scale", {"num_blocks": 2, "sharing": "shared"}, "can't be built"),
        ("block-channels", {"num_blocks": 2, "start": float("nan")}, "must be a finite number, got nan"),
        ("block-channels", {"num_blocks": 2, "decay_to": float("inf")}, "`decay_to` .* finite number, got inf"),
        ("block-channels", {"num_blocks": 2, "by_channel": False}, "`by_channel` is set by"),
        ("block-channels-time", {}, "`num_blocks` must be given"),
        ("block-channels-time", {"num_blocks": 2, "reduction": 3}, "`reduction` must divide the 16 channels, got 3"),
    ],
)
def test_arguments_that_do_not_fit_are_named(name: str, arguments: dict, error: str) -> None:
    with pytest.raises(InputError, match=error):
        build_attention(name, 16, **arguments)
