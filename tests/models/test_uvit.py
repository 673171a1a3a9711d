"""UViT against the published counts and an independent functional form of the official network."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dia_diffusion import UViT
from dia_diffusion.attention import UNITS
from dia_diffusion.errors import InputError
from dia_diffusion.models.uvit import UVIT_SIZES

SMALL = {"sample_size": 8, "patch_size": 2, "hidden_size": 32, "num_layers": 5, "num_attention_heads": 4}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_counts() -> None:
    assert count(UViT(attention=None)) == 44_255_328
    assert count(UViT()) == 44_255_328 + 659_712
    # Table 1 of the U-ViT paper, in millions; M, L and H are ImageNet's, with its classes.
    with torch.device("meta"):
        for name, millions in (("S", 44), ("S-deep", 58), ("M", 131), ("L", 287), ("H", 501)):
            num_classes = 1000 if name in "MLH" else None
            model = UViT.from_size(f"{name}/2", attention=None, num_classes=num_classes)
            assert round(count(model) / 1e6) == millions, name


def reference(
    state: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor, heads: int, patch: int, residual: bool = True
) -> torch.Tensor:
    """U-ViT's function from its weights, written from the paper's figure and nothing else here."""
    b, channels, size, _ = x.shape
    tokens = F.conv2d(x, state["patch_embed.weight"], state["patch_embed.bias"], stride=patch)
    width, grid = tokens.shape[1], tokens.shape[2]
    tokens = torch.stack([tokens[:, :, i // grid, i % grid] for i in range(grid * grid)], dim=1)
    frequencies = torch.tensor([10000.0 ** (-i / (width // 2)) for i in range(width // 2)])
    angles = torch.outer(t, frequencies)
    time = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    z = torch.cat([time[:, None], tokens], dim=1) + state["pos_embed"]

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return F.linear(value, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name: str, value: torch.Tensor) -> torch.Tensor:
        if f"{name}.weight" not in state:  # a network without norms
            return value
        return F.layer_norm(value, (width,), state[f"{name}.weight"], state[f"{name}.bias"])

    def block(name: str, value: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        if skip is not None:
            value = linear(f"{name}.skip_linear", torch.cat([value, skip], dim=2))
        q, k, v = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", value)).chunk(3, dim=2)
        out = []
        for part in range(heads):
            columns = slice(part * width // heads, (part + 1) * width // heads)
            scores = q[:, :, columns] @ k[:, :, columns].transpose(1, 2) / (width // heads) ** 0.5
            out.append(scores.softmax(dim=2) @ v[:, :, columns])
        value = residual * value + linear(f"{name}.attn.proj", torch.cat(out, dim=2))
        return residual * value + linear(
            f"{name}.mlp.fc2", F.gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", value)))
        )

    depth = len({name.split(".")[1] for name in state if name.startswith("in_blocks")})
    kept = []
    for i in range(depth):
        z = block(f"in_blocks.{i}", z)
        kept.append(z)
    z = block("mid_block", z)
    for i in range(depth):
        z = block(f"out_blocks.{i}", z, kept[depth - 1 - i])
    pixels = linear("decoder", norm("norm", z))[:, 1:]
    image = torch.zeros(b, channels, size, size)
    for index in range(grid * grid):
        row, column = patch * (index // grid), patch * (index % grid)
        square = pixels[:, index].reshape(b, patch, patch, channels).permute(0, 3, 1, 2)
        image[:, :, row : row + patch, column : column + patch] = square
    return F.conv2d(image, state["output_conv.weight"], state["output_conv.bias"], padding=1)


def test_without_unit_it_is_uvit() -> None:
    torch.manual_seed(0)
    model = UViT(**SMALL, attention=None)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0.0, 3.7, 999.0])
    with torch.no_grad():
        difference = (model(x, t).sample - reference(model.state_dict(), x, t, heads=4, patch=2)).abs().max()
    assert difference < 1e-5


@pytest.mark.skipif("UVIT_REPO" not in os.environ, reason="UVIT_REPO names no checkout of the official U-ViT")
def test_same_function_as_the_official_network() -> None:
    repo = Path(os.environ["UVIT_REPO"])
    sys.path.insert(0, str(repo))
    spec = importlib.util.spec_from_file_location("libs.uvit", repo / "libs" / "uvit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    official = module.UViT(img_size=32, patch_size=2, embed_dim=512, depth=12, num_heads=8).eval()
    names = {"patch_embed.proj.": "patch_embed.", "decoder_pred.": "decoder.", "final_layer.": "output_conv."}
    state = official.state_dict()
    for old, new in names.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    model = UViT(attention=None).eval()
    model.load_state_dict(state)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([3.3, 777.0])
    with torch.no_grad():
        assert (official(x, t) - model(x, t).sample).abs().max() < 1e-5


@pytest.mark.parametrize("attention", UNITS)
def test_twins_differ_in_the_unit_alone(attention: str) -> None:
    torch.manual_seed(7)
    plain = UViT(**SMALL, attention=None)
    after_plain = torch.rand(1)
    torch.manual_seed(7)
    twin = UViT(**SMALL, attention=attention)
    after_twin = torch.rand(1)
    state = twin.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    assert {name.split(".")[0] for name in state.keys() - plain.state_dict().keys()} <= {"unit"}
    assert torch.equal(after_plain, after_twin)


def test_state_runs_through_all_blocks_and_starts_anew() -> None:
    model = UViT(**SMALL)
    calls = []
    model.unit.register_forward_hook(lambda _, inputs, output: calls.append((inputs[1], output[1])))
    for _ in range(2):
        calls.clear()
        model(torch.randn(2, 3, 8, 8), 10)
        assert len(calls) == 5 and calls[0][0] is None
        assert all(given is returned for (given, _), (_, returned) in zip(calls[1:], calls, strict=False))


def test_unit_stands_between_norm_and_mlp() -> None:
    model = UViT(**SMALL)
    block = model.mid_block
    x = torch.randn(2, 17, 32)
    y, _ = block(x, model._recalibrate, None)
    z = x + block.attn(block.norm1(x))
    features = block.norm2(z)
    h, _ = model.unit.step(features.mean(1), None)
    assert torch.allclose(y, z + block.mlp(features * h[-1][:, None]), atol=1e-6)


def test_pooling_over_patches_leaves_the_time_token_out() -> None:
    torch.manual_seed(0)
    every, patch = UViT(**SMALL), UViT(**SMALL, pool_tokens="patch")
    patch.load_state_dict(every.state_dict())
    pooled = []
    for model in (every, patch):
        inputs = []
        model.unit.register_forward_hook(lambda _, given, __, inputs=inputs: inputs.append(given))
        model(torch.zeros(1, 3, 8, 8), 1)
        pooled.append(inputs[0][2])
    assert pooled == [0, 1]


def test_classes_and_null_label() -> None:
    model = UViT(**SMALL, num_classes=3).eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2.0])
    assert model.label_embed.num_embeddings == 4
    null = model(x, t, torch.tensor([3, 3])).sample
    assert torch.equal(model(x, t).sample, null)
    assert not torch.equal(model(x, t, torch.tensor([0, 1])).sample, null)
    with pytest.raises(InputError, match="unconditional"):
        UViT(**SMALL)(x, t, torch.tensor([0, 1]))


def test_sizes_are_odd_and_named() -> None:
    assert all(size["num_layers"] % 2 for size in UVIT_SIZES.values())
    assert UViT.from_size("tiny/4", sample_size=8).config.patch_size == 4


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num_layers": 4}, "`num_layers` must be odd .*, got 4"),
        ({"sample_size": 9}, "`sample_size` must be a multiple of patch_size 2, got 9"),
        ({"num_attention_heads": 5}, "`num_attention_heads` must divide hidden_size .*, got 5"),
        ({"attention": "dia"}, "'dia'"),
        ({"attention_kwargs": {"reduction": 5}}, "`reduction` must divide .*, got 5"),
        ({"pool_tokens": "first"}, "'first'"),
        ({"initialization": "he"}, "'he'"),
    ],
)
def test_sizes_that_do_not_fit_are_named(wrong: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        UViT(**{**SMALL, **wrong})
    with pytest.raises(InputError, match="size must be SIZE/PATCH"):
        UViT.from_size("XL/2")
    with pytest.raises(InputError, match="`sample` must have shape"):
        UViT(**SMALL)(torch.randn(1, 3, 16, 16), 1)
