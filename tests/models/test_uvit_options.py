"""UViT without residual additions, without LayerNorm, and with the unit in some of its blocks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dia_diffusion import UViT
from dia_diffusion.errors import InputError
from tests.models.test_uvit import SMALL, count, reference


@pytest.mark.parametrize("options", [{"residual_skips": False}, {"layer_norm": False}])
def test_function_without_a_part(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = UViT(**SMALL, attention=None, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0.0, 3.7, 999.0])
    residual = options.get("residual_skips", True)
    with torch.no_grad():
        found, expected = model(x, t).sample, reference(model.state_dict(), x, t, 4, 2, residual=residual)
        whole = reference(model.state_dict(), x, t, 4, 2) if "residual_skips" in options else None
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert whole is None or (found - whole).abs().max() > 0.1


def test_layer_norms_are_the_only_parameters_that_go() -> None:
    with_norms, without = UViT(**SMALL), UViT(**SMALL, layer_norm=False)
    assert count(with_norms) - count(without) == (5 * 2 + 1) * 2 * 32  # two a block and the last, weight and bias
    assert count(UViT(**SMALL, residual_skips=False)) == count(with_norms)


def test_chosen_blocks_alone_carry_the_unit_in_the_order_they_run() -> None:
    model = UViT(**SMALL, attention="block-scale", attention_blocks=[3, 0])
    assert model.attention_blocks == [0, 3] and model.unit.scale.shape == (2, 1)
    scales = torch.tensor([[2.0], [-0.5]])
    model.unit.scale.data.copy_(scales)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0])
    plain = UViT(**SMALL, attention=None)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("unit")})
    # What the unit does to the input of a block's MLP, a scale in its first layer does too, where its bias is 0.
    for index, scale in ((0, 2.0), (3, -0.5)):
        block = [*plain.in_blocks, plain.mid_block, *plain.out_blocks][index]
        block.mlp.fc1.weight.data *= scale
    with torch.no_grad():
        assert torch.allclose(model(x, t).sample, plain(x, t).sample, atol=1e-5)


def test_state_passes_over_blocks_without_the_unit() -> None:
    model, calls = UViT(**SMALL, attention_blocks=[1, 2, 4]), []
    model.unit.register_forward_hook(lambda _, inputs, output: calls.append((inputs[1], output[1])))
    model(torch.randn(2, 3, 8, 8), 10)
    assert len(calls) == 3 and calls[0][0] is None
    assert all(given is returned for (given, _), (_, returned) in zip(calls[1:], calls, strict=False))


@pytest.mark.parametrize("blocks", [[], [5], [-1], [1, 1]])
def test_blocks_that_there_are_not(blocks: list[int]) -> None:
    with pytest.raises(InputError, match="must be one or more of 0 to 4"):
        UViT(**SMALL, attention_blocks=blocks)


def test_blocks_need_a_unit() -> None:
    with pytest.raises(InputError, match="must be null without attention"):
        UViT(**SMALL, attention=None, attention_blocks=[0])


def test_config_of_an_older_pipeline_loads(tmp_path: Path) -> None:
    model = UViT(**SMALL)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("residual_skips", "layer_norm", "attention_blocks"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, x = UViT.from_pretrained(tmp_path), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(loaded(x, 7).sample, model.eval()(x, 7).sample, atol=1e-6)


def test_saved_options_come_back(tmp_path: Path) -> None:
    model = UViT(**SMALL, residual_skips=False, layer_norm=False, attention_blocks=[2]).eval()
    model.save_pretrained(tmp_path)
    loaded, x = UViT.from_pretrained(tmp_path), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(loaded(x, 7).sample, model(x, 7).sample, atol=1e-6)
