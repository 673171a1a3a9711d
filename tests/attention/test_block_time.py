"""The control that knows block, channel and time: against its formula in loops, and blind to the image."""

import math
from pathlib import Path

import pytest
import torch

from dia_diffusion import UViT, attach
from dia_diffusion.analysis.attention_maps import attention_maps
from dia_diffusion.attention import build_attention
from dia_diffusion.errors import InputError
from tests.attention.networks import tiny_unet

NAME = "block-channels-time"
SMALL = {"sample_size": 8, "patch_size": 2, "hidden_size": 32, "num_layers": 3, "num_attention_heads": 4}


def scrambled(**kwargs: object) -> UViT:
    torch.manual_seed(0)
    model = UViT(**SMALL, attention=NAME, **kwargs).eval()
    for parameter in model.unit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def embedded(time: float, dim: int) -> list[float]:
    angles = [time * 10000 ** (-i / (dim // 2)) for i in range(dim // 2)]
    return [*map(math.cos, angles), *map(math.sin, angles)]


def test_scales_are_its_formula_and_the_same_for_every_image() -> None:
    model = scrambled()
    unit, times = model.unit, [3.5, 700.0]
    maps = attention_maps(model, torch.randn(2, 3, 8, 8), torch.tensor(times))  # (3, 2, 32)
    assert torch.equal(maps, attention_maps(model, torch.randn(2, 3, 8, 8), torch.tensor(times)))
    v, u = unit.hidden.weight.tolist(), unit.hidden.bias.tolist()
    for i, time in enumerate(times):
        sums = [sum(a * b for a, b in zip(row, embedded(time, 32), strict=True)) for row in v]
        hidden = [(s + bias) / (1 + math.exp(-s - bias)) for s, bias in zip(sums, u, strict=True)]
        for block in range(3):
            for n in range(32):
                products = [w * h for w, h in zip(unit.weight[block, n].tolist(), hidden, strict=True)]
                expected = 1 + sum(products) + unit.bias[block, n].item()
                assert maps[block, i, n].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_it_has_scales_for_the_blocks_that_carry_it() -> None:
    model = scrambled(attention_blocks=[0, 2])
    assert model.unit.bias.shape == (2, 32)
    assert sum(p.numel() for p in model.unit.parameters()) == 32 * 8 + 8 + 2 * (32 * 8 + 32)
    with pytest.raises(InputError, match="must be 2 at most, got call 3"):
        model.unit(torch.randn(1, 3, 32), (2, torch.zeros(1, 32)))


def test_compiled_it_is_the_same_function() -> None:
    model = scrambled()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 500.0])
    assert torch.allclose(model(x, t).sample, compiled(x, t).sample, atol=1e-6)


def test_precision_is_that_of_the_features(tmp_path: Path) -> None:
    model = scrambled()
    x = torch.randn(2, 3, 8, 8)
    exact = model(x, 300).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x, 300).sample
    assert (low.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert model.to(torch.bfloat16)(x.bfloat16(), 300).sample.dtype == torch.bfloat16


def test_networks_without_a_time_for_it_refuse_it() -> None:
    with pytest.raises(InputError, match=f"must not need the time, which only a UViT gives its unit, got '{NAME}'"):
        attach(tiny_unet(), NAME)
    assert build_attention(NAME, 8, num_blocks=2) is not None
