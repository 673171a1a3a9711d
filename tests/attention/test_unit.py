"""Sharing: one module for all blocks or one per block, with BatchNorms per block, in every setting."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dia_diffusion import UViT
from dia_diffusion.attention import build_attention
from dia_diffusion.errors import InputError
from tests.attention.networks import SAMS, count

# The last one adds a BatchNorm to CBAM.
CASES = [(name, {}) for name in SAMS] + [("cbam", {"spatial_norm": True})]
SMALL = {"sample_size": 8, "patch_size": 2, "hidden_size": 16, "num_layers": 3, "num_attention_heads": 4}


def scramble(unit: torch.nn.Module) -> torch.nn.Module:
    for parameter in unit.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return unit


def model_with(name: str, sharing: str = "shared", **options: object) -> UViT:
    torch.manual_seed(0)
    model = UViT(**SMALL, attention=name, attention_kwargs={"sharing": sharing, **options})
    scramble(model.unit)
    return model


def norm_counts(name: str, options: dict) -> int:
    """The number of parameters of a block's BatchNorm: a weight and a bias per channel."""
    return {"srm": 2 * 16, "cbam": 2}[name] if name == "srm" or options else 0


@pytest.mark.parametrize(("name", "options"), CASES)
def test_individual_sharing_equals_separate_modules(name: str, options: dict) -> None:
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
def test_sharing_divides_the_parameters_by_the_number_of_blocks_except_batch_norms(name: str, options: dict) -> None:
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


def test_each_block_has_its_own_running_statistics_by_default() -> None:
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


def test_one_value_per_channel_is_refused_in_training() -> None:
    unit = build_attention("srm", 4, num_blocks=1)
    with pytest.raises(InputError, match="batches must have 2 images or more"):
        unit(torch.randn(1, 9, 4))
    assert unit.eval()(torch.randn(1, 9, 4))[0].shape == (1, 9, 4)
