"""What sharing means: one module for all blocks or one a block, BatchNorms that belong to blocks, in every setting."""

import copy
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dia_diffusion import UViT
from dia_diffusion.attention import build_attention
from dia_diffusion.errors import InputError

MODULES = ("se", "eca", "cbam", "srm", "spa", "sem", "spem", "sge")
# Those that have BatchNorms too.
CASES = [(name, {}) for name in MODULES] + [("cbam", {"spatial_norm": True})]
SMALL = {"sample_size": 8, "patch_size": 2, "hidden_size": 16, "num_layers": 3, "num_attention_heads": 4}


def scramble(unit: torch.nn.Module) -> torch.nn.Module:
    for parameter in unit.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return unit


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def model_with(name: str, sharing: str = "shared", **options: object) -> UViT:
    torch.manual_seed(0)
    model = UViT(**SMALL, attention=name, attention_kwargs={"sharing": sharing, **options})
    scramble(model.unit)
    return model


def norm_counts(name: str, options: dict) -> int:
    """Parameters of a block's BatchNorm, weights and biases of each channel."""
    return {"srm": 2 * 16, "cbam": 2}[name] if name == "srm" or options else 0


@pytest.mark.parametrize(("name", "options"), CASES)
def test_individual_is_as_many_separate_modules(name: str, options: dict) -> None:
    torch.manual_seed(0)
    unit = scramble(build_attention(name, 16, num_blocks=3, sharing="individual", **options))
    separate = [build_attention(name, 16, num_blocks=1, **options) for _ in range(3)]
    for block, single in enumerate(separate):
        single.sams[0].load_state_dict(unit.sams[block].state_dict())
        if len(unit.norms):
            single.norms[0].load_state_dict(unit.norms[block].state_dict())
    state = None
    for single in separate:
        features = torch.randn(4, 17, 16)
        recalibrated, state = unit(features, state, 0, 1)
        expected, own_state = single(features, None, 0, 1)
        assert torch.equal(recalibrated, expected)
        assert torch.equal(unit.attention_map(state), single.attention_map(own_state))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_sharing_divides_the_parameters_by_the_blocks_but_for_batch_norms(name: str, options: dict) -> None:
    single = count(build_attention(name, 16, num_blocks=1, **options))
    norm = norm_counts(name, options)
    counts = {
        s: count(build_attention(name, 16, num_blocks=18, sharing=s, **options)) for s in ("shared", "individual")
    }
    assert counts == {"individual": 18 * single, "shared": single - norm + 18 * norm}
    if norm:
        assert count(build_attention(name, 16, num_blocks=18, share_norm=True, **options)) == single
    else:
        assert counts["shared"] / counts["individual"] == pytest.approx(1 - 0.944, abs=5e-4)  # III-A, ResNet164


def test_each_block_has_running_statistics_of_its_own_unless_told() -> None:
    torch.manual_seed(1)
    features = [torch.randn(8, 16, 3, 3) + block for block in range(3)]
    for share_norm in (False, True):
        unit = scramble(build_attention("srm", 16, num_blocks=3, share_norm=share_norm))
        expected = [torch.zeros(16) for _ in range(3)]
        state = None
        for block, maps in enumerate(features):
            _, state = unit(maps, state)
            style = unit.sams[0].extract(maps, 0, 0)
            z = (style * unit.sams[0].weight).sum(dim=2)
            mean = expected[0 if share_norm else block]
            mean += 0.1 * (z.mean(dim=0) - mean)  # torch's momentum
        assert len(unit.norms) == (1 if share_norm else 3)
        for norm, mean in zip(unit.norms, expected, strict=False):
            assert torch.allclose(norm.running_mean, mean, atol=1e-6)
            assert norm.num_batches_tracked == (3 if share_norm else 1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_batch_counts_once(reentrant: bool) -> None:
    torch.manual_seed(2)
    unit = scramble(build_attention("srm", 16, num_blocks=2))
    twin = copy.deepcopy(unit)
    maps = torch.randn(4, 16, 3, 3, requires_grad=True)

    def blocks(features: torch.Tensor, of: torch.nn.Module) -> torch.Tensor:
        features, state = of(features, None)
        return of(features, state)[0]

    checkpoint(blocks, maps, unit, use_reentrant=reentrant).square().sum().backward()
    recomputed = maps.grad.clone()
    maps.grad = None
    blocks(maps, twin).square().sum().backward()
    assert torch.allclose(recomputed, maps.grad, atol=1e-6)
    for (name, ours), theirs in zip(unit.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert all(norm.num_batches_tracked == 1 for norm in unit.norms)


def test_in_evaluation_nothing_updates() -> None:
    model = model_with("srm").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.randn(2, 3, 8, 8), 5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# Compiling takes seconds: those with the most to trace stand for all.
WAYS = [("checkpointed", *case) for case in CASES]
WAYS += [
    ("compiled", "sge", {}),
    ("compiled", "cbam", {"spatial_norm": True}),
    ("compiled and checkpointed", "srm", {}),
]


@pytest.mark.parametrize(("how", "name", "options"), WAYS)
def test_checkpointed_and_compiled_it_is_the_same(how: str, name: str, options: dict) -> None:
    torch.manual_seed(3)
    torch._dynamo.reset()
    unit = scramble(build_attention(name, 16, num_blocks=3, sharing="individual", **options))
    twin = copy.deepcopy(unit)
    tokens = torch.randn(4, 17, 16)

    def block(x: torch.Tensor, of: torch.nn.Module, state: object) -> tuple[torch.Tensor, object]:
        features, state = of(x.tanh(), state, 0, 1)
        return x + features, state

    def blocks(x: torch.Tensor, of: torch.nn.Module, checkpointed: bool) -> torch.Tensor:
        state = None
        for _ in range(3):
            if checkpointed:
                x, state = checkpoint(block, x, of, state, use_reentrant=False)
            else:
                x, state = block(x, of, state)
        return x

    # In one piece, without an optimizing backend, which would need a C compiler.
    run = torch.compile(blocks, fullgraph=True, backend="aot_eager") if "compiled" in how else blocks
    run(tokens, unit, "checkpointed" in how).square().sum().backward()
    blocks(tokens, twin, False).square().sum().backward()
    for ours, theirs in zip(unit.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(unit.buffers(), twin.buffers(), strict=True):
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_maps_are_float32_under_autocast_and_in_half_precision(name: str, options: dict) -> None:
    model = model_with(name, **options)
    x = torch.randn(2, 3, 8, 8)
    exact = model(x, 300).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x, 300).sample
    assert (low.float() - exact).abs().max() < 0.05 * exact.abs().max()
    cast = copy.deepcopy(model).to(torch.bfloat16).eval()
    assert cast(x.bfloat16(), 300).sample.dtype == torch.bfloat16
    recalibrated, state = cast.unit(torch.randn(2, 17, 16).bfloat16(), None, 0, 1)
    assert recalibrated.dtype == torch.bfloat16
    assert cast.unit.attention_map(state).dtype == torch.float32


@pytest.mark.parametrize(("name", "options"), CASES)
def test_saved_and_loaded_it_is_the_same_function(name: str, options: dict, tmp_path: Path) -> None:
    model = model_with(name, "individual", **options)
    model(torch.randn(4, 3, 8, 8), 5)  # BatchNorms have running statistics to save
    model.eval().save_pretrained(tmp_path)
    loaded = UViT.from_pretrained(tmp_path)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(model(x, 5).sample, loaded(x, 5).sample, atol=1e-6)


def test_one_value_a_channel_is_refused_in_training() -> None:
    unit = build_attention("srm", 4, num_blocks=1)
    with pytest.raises(InputError, match="batches must have 2 images or more"):
        unit(torch.randn(1, 9, 4))
    assert unit.eval()(torch.randn(1, 9, 4))[0].shape == (1, 9, 4)


def test_more_blocks_than_it_has_are_refused() -> None:
    for name, sharing in (("se", "individual"), ("srm", "shared")):
        unit = build_attention(name, 16, num_blocks=1, sharing=sharing).eval()
        _, state = unit(torch.randn(1, 3, 16))
        with pytest.raises(InputError, match="must be 1 at most, got call 2"):
            unit(torch.randn(1, 3, 16), state)


@pytest.mark.parametrize(
    ("name", "kwargs", "named"),
    [
        ("se", {"sharing": "both"}, "`sharing` must be one of shared, individual, got 'both'"),
        ("se", {"sharing": "individual"}, "`num_blocks` must be 1 or more .*, got None"),
        ("srm", {}, "`num_blocks` must be 1 or more"),
        ("se", {"share_norm": True}, "must be false for a unit without BatchNorm"),
        (
            "srm",
            {"share_norm": True, "sharing": "individual", "num_blocks": 2},
            "must be false with individual sharing",
        ),
        ("srm", {"share_norm": "no", "num_blocks": 2}, "`share_norm` must be true or false, got 'no'"),
        ("se", {"module": None}, "`module` is set by"),
        ("dia-lstm", {"sharing": "individual"}, "`sharing` must be shared for dia-lstm, .*, got 'individual'"),
        ("lstm", {"sharing": "individual"}, "`sharing` must be shared for lstm"),
        ("block-scale", {"num_blocks": 2, "sharing": "shared"}, "can't be built"),
    ],
)
def test_arguments_that_do_not_fit_are_named(name: str, kwargs: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        build_attention(name, 16, **kwargs)
