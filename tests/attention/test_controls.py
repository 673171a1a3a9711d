"""The controls against their formulas, as loops over blocks and channels."""

import math

import pytest
import torch

from dia_diffusion import UViT, attach
from dia_diffusion.analysis.attention_maps import attention_maps
from dia_diffusion.attention import build_attention
from dia_diffusion.errors import InputError
from tests.attention.networks import count, tiny_unet

COUNTS = {"fixed-scale": 0, "block-scale": 3, "block-channels": 3 * 32}
SMALL = {"sample_size": 8, "patch_size": 2, "hidden_size": 32, "num_layers": 3, "num_attention_heads": 4}
TIME = "block-channels-time"


@pytest.mark.parametrize("name", COUNTS)
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
    assert count(build_attention(name, 32, num_blocks=3)) == COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_controls_start_at_dia_lstms_initial_scale_by_default(name: str) -> None:
    features = torch.randn(2, 4, 6)
    zero, _ = build_attention("dia-lstm", 6, reduction=2, initialization="zero")(features)
    assert torch.equal(build_attention(name, 6, num_blocks=3)(features)[0], zero)
    option = "scale" if name == "fixed-scale" else "start"
    assert torch.equal(build_attention(name, 6, num_blocks=3, **{option: 1})(features)[0], features)


@pytest.mark.parametrize("name", ["block-scale", "block-channels"])
@pytest.mark.parametrize("decay_to", [0.0, 1.0])
def test_weight_decay_pulls_scales_to_decay_to(name: str, decay_to: float) -> None:
    unit = build_attention(name, 6, num_blocks=3, start=1.5, decay_to=decay_to)
    assert torch.equal(unit.attention_map(2), torch.full_like(unit.attention_map(2), 1.5))
    optimizer = torch.optim.AdamW(unit.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):  # without a gradient, only the decay moves the parameters
        unit.scale.grad = torch.zeros_like(unit.scale)
        optimizer.step()
    expected = decay_to + (1.5 - decay_to) * 0.95**3
    assert torch.allclose(unit.attention_map(2), torch.tensor(expected), rtol=1e-6)


def test_time_dependent_scales_match_their_formula_and_ignore_the_image() -> None:
    torch.manual_seed(0)
    model, times = UViT(**SMALL, attention=TIME).eval(), [3.5, 700.0]
    unit = model.unit
    for parameter in unit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    maps = attention_maps(model, torch.randn(2, 3, 8, 8), torch.tensor(times))  # (3, 2, 32)
    assert torch.equal(maps, attention_maps(model, torch.randn(2, 3, 8, 8), torch.tensor(times)))
    v, u = unit.hidden.weight.tolist(), unit.hidden.bias.tolist()
    for i, time in enumerate(times):
        angles = [time * 10000 ** (-k / 16) for k in range(16)]
        embedding = [*map(math.cos, angles), *map(math.sin, angles)]
        sums = [sum(a * b for a, b in zip(row, embedding, strict=True)) + bias for row, bias in zip(v, u, strict=True)]
        hidden = [s / (1 + math.exp(-s)) for s in sums]
        for block in range(3):
            for n in range(32):
                products = [w * h for w, h in zip(unit.weight[block, n].tolist(), hidden, strict=True)]
                expected = 1 + sum(products) + unit.bias[block, n].item()
                assert maps[block, i, n].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_time_dependent_scales_exist_only_for_the_chosen_blocks_of_a_uvit() -> None:
    unit = UViT(**SMALL, attention=TIME, attention_blocks=[0, 2]).unit
    assert unit.bias.shape == (2, 32) and count(unit) == 32 * 8 + 8 + 2 * (32 * 8 + 32)
    with pytest.raises(InputError, match=f"must not need the time, which only a UViT gives its unit, got '{TIME}'"):
        attach(tiny_unet(), TIME)
