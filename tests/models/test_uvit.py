"""UViT against published parameter counts and an independent functional version of the official network."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dia_diffusion import UViT
from dia_diffusion.attention import UNITS
from dia_diffusion.errors import InputError
from tests.attention.networks import count
from tests.models.reference_uvit import official, u_vit

SMALL = {"sample_size": 8, "patch_size": 2, "hidden_size": 32, "num_layers": 5, "num_attention_heads": 4}


def test_published_counts() -> None:
    with torch.device("meta"):
        assert count(UViT(attention=None)) == 44_255_328
        assert count(UViT()) == 44_255_328 + 659_712
        # Table 1 of the U-ViT paper, in millions; M, L and H are for ImageNet, with its classes.
        for name, millions in (("S", 44), ("S-deep", 58), ("M", 131), ("L", 287), ("H", 501)):
            num_classes = 1000 if name in "MLH" else None
            model = UViT.from_size(f"{name}/2", attention=None, num_classes=num_classes)
            assert round(count(model) / 1e6) == millions, name


@pytest.mark.parametrize("options", [{}, {"residual_skips": False}, {"layer_norm": False}], ids=str)
def test_without_unit_it_matches_u_vit(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = UViT(**SMALL, attention=None, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0.0, 3.7, 999.0])
    residual = options.get("residual_skips", True)
    with torch.no_grad():
        found, weights = UViT.from_pretrained(tmp_path)(x, t).sample, official(model.state_dict())
        expected, plain = (u_vit(weights, x, t, residual=skips) for skips in (residual, True))
    assert (found - expected).abs().max() < 1e-5 * max(1, 10 * expected.abs().max())
    assert residual or (found - plain).abs().max() > 0.1


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


@pytest.mark.parametrize("blocks", [None, [1, 2, 4]])
def test_state_passes_through_the_chosen_blocks_and_restarts_each_pass(blocks: list[int] | None) -> None:
    model = UViT(**SMALL, attention_blocks=blocks)
    calls = []
    model.unit.register_forward_hook(lambda _, inputs, output: calls.append((inputs[1], output[1])))
    for _ in range(2):
        calls.clear()
        model(torch.randn(2, 3, 8, 8), 10)
        assert len(calls) == len(blocks or range(5)) and calls[0][0] is None
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


def test_layer_norm_false_removes_only_the_layer_norms() -> None:
    with_norms, without = UViT(**SMALL), UViT(**SMALL, layer_norm=False)
    # Two per block and the last one, each with weight and bias.
    assert count(with_norms) - count(without) == (5 * 2 + 1) * 2 * 32
    assert count(UViT(**SMALL, residual_skips=False)) == count(with_norms)


def test_only_chosen_blocks_carry_the_unit_in_execution_order(tmp_path: Path) -> None:
    model = UViT(**SMALL, attention="block-scale", attention_blocks=[3, 0])
    assert model.attention_blocks == [0, 3] and model.unit.scale.shape == (2, 1)
    scales = torch.tensor([[2.0], [-0.5]])
    model.unit.scale.data.copy_(scales)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0])
    plain = UViT(**SMALL, attention=None)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("unit")})
    # Scaling the weights of a block's fc1 equals the unit's scaling of the MLP's input, since fc1's bias is 0.
    for index, scale in ((0, 2.0), (3, -0.5)):
        block = [*plain.in_blocks, plain.mid_block, *plain.out_blocks][index]
        block.mlp.fc1.weight.data *= scale
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = plain(x, t).sample
        for saved in (model, UViT.from_pretrained(tmp_path)):
            assert torch.allclose(saved(x, t).sample, expected, atol=1e-5)


def test_config_of_an_older_pipeline_loads(tmp_path: Path) -> None:
    model = UViT(**SMALL)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    later = ("residual_skips", "layer_norm", "attention_blocks", "skip_scaling", "skip_kappa", "qk_norm", "drop_path")
    for key in later:
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, x = UViT.from_pretrained(tmp_path), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(loaded(x, 7).sample, model.eval()(x, 7).sample, atol=1e-6)


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
        ({"num_classes": 0}, "must be above 0"),
        *(({"attention_blocks": blocks}, "must be one or more of 0 to 4") for blocks in ([], [5], [-1], [1, 1])),
        ({"attention_blocks": [0], "attention": None}, "must be null without attention"),
        ({"skip_scaling": "linear"}, "`skip_scaling` must be one of none, constant, power, learned, got 'linear'"),
        ({"skip_scaling": "constant", "long_skips": False}, "`skip_scaling` must be none .* long skips"),
        ({"skip_scaling": "learned", "num_layers": 1}, "`skip_scaling` must be none .* long skips"),
        ({"skip_scaling": "constant", "skip_kappa": 0.5}, "`skip_kappa` must be null unless .* power, got 0.5"),
        *(
            ({"skip_scaling": "power", "skip_kappa": kappa}, f"`skip_kappa` must be above 0 .*, got {kappa}")
            for kappa in (None, 0.0, 1.5, float("nan"))
        ),
        *(({"drop_path": rate}, f"`drop_path` must be 0 or more and below 1, got {rate}") for rate in (-0.1, 1.0)),
        ({"drop_path": 0.1, "residual_skips": False}, "`drop_path` must be 0 without residual_skips or with one block"),
        (
            {"drop_path": 0.1, "num_layers": 1},
            "`drop_path` must be 0 without residual_skips or with one block, got 0.1",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_named(wrong: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        UViT(**{**SMALL, **wrong})
    with pytest.raises(InputError, match="size must be SIZE/PATCH"):
        UViT.from_size("XL/2")
    with pytest.raises(InputError, match="`sample` must have shape"):
        UViT(**SMALL)(torch.randn(1, 3, 16, 16), 1)
