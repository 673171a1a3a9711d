"""Stages, blocks and maps of networks with attached units, against their modules."""

import pytest
import torch
from torch import nn

from dia_diffusion.analysis.correlation import ANALYSIS as CORRELATION
from dia_diffusion.analysis.gradients import ANALYSIS as GRADIENTS
from dia_diffusion.analysis.gradients import gradients_at
from dia_diffusion.analysis.run import Coverage, GradientBatches, open_runs
from dia_diffusion.analysis.stages import attended_stages, maps_during, stages_of
from dia_diffusion.errors import InputError
from dia_diffusion.models.attach import attach
from dia_diffusion.models.cifar_resnet import Layers, cifar_resnet
from dia_diffusion.models.uvit import UViT
from tests.analysis.conftest import MakeRun


def resnet(depth: int = 20) -> nn.Module:
    torch.manual_seed(0)
    return cifar_resnet(depth, 10, Layers("batch", True, True), basic=True).eval()


def test_a_resnet_has_three_stages_with_and_without_unit() -> None:
    plain, attached = resnet(), resnet()
    attach(attached, "se", sharing="individual")
    for model in (plain, attached):
        stages = stages_of(model)
        assert [(stage.name, stage.channels) for stage in stages] == [("stage 1", 16), ("stage 2", 32), ("stage 3", 64)]
        assert [stage.blocks for stage in stages] == [(f"{n}.1", f"{n}.2", f"{n}.3") for n in (1, 2, 3)]
        assert [list(stage.outputs) for stage in stages] == [list(stage) for stage in model.stages]
    assert [stage.unit for stage in stages_of(attached)] == list(attached.attention_units)
    with pytest.raises(InputError, match="no attention unit"):
        attended_stages(plain)


def test_stage_maps_are_the_scales_applied_to_branches() -> None:
    model = resnet()
    attach(model, "se", reduction=4, sharing="individual")
    images = torch.randn(2, 3, 16, 16)
    seen: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {unit: [] for unit in model.attention_units}
    for unit, calls in seen.items():
        unit.register_forward_hook(lambda _, given, returned, calls=calls: calls.append((given[0], returned[0])))
    stages = attended_stages(model)
    maps = maps_during(stages, lambda: model(images))
    assert [tuple(h.shape) for h in maps] == [(3, 2, 16), (3, 2, 32), (3, 2, 64)]
    for stage, h in zip(stages, maps, strict=True):
        assert len(seen[stage.unit]) == 3
        for index, (features, recalibrated) in enumerate(seen[stage.unit]):
            assert torch.allclose(features * h[index][..., None, None], recalibrated, atol=1e-6)


def test_a_part_of_the_blocks_can_carry_the_unit() -> None:
    model = resnet()
    attach(model, "dia-lstm", at=["stages.1.0.branch", "stages.1.2.branch"])
    first, second, third = stages_of(model)
    assert (first.unit, third.unit, second.attended) == (None, None, (0, 2))
    assert second.attended_blocks == ("2.1", "2.3") and len(second.outputs) == 3
    uvit = UViT(sample_size=8, hidden_size=16, num_layers=3, num_attention_heads=2, attention_blocks=[0, 2])
    (stage,) = attended_stages(uvit)
    assert stage.attended_blocks == ("in 1", "out 1")
    (maps,) = maps_during([stage], lambda: uvit(torch.randn(2, 3, 8, 8), torch.zeros(2)))
    assert maps.shape == (2, 2, 16)


def test_units_at_custom_positions_form_stages() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))
    with pytest.raises(InputError, match="whose blocks attach"):
        stages_of(model)
    attach(model, "dia-lstm", at=["0", "1", "2"])
    wide, narrow = stages_of(model)
    assert (wide.blocks, wide.channels) == (("1.1", "1.2"), 8) and (narrow.blocks, narrow.channels) == (("2.1",), 4)
    assert wide.outputs == (model[0], model[1])


def test_gradients_reach_the_ends_of_residual_blocks() -> None:
    model = resnet()
    images = torch.randn(2, 3, 16, 16)
    outputs = [block for stage in stages_of(model) for block in stage.outputs]
    found: dict[int, torch.Tensor] = {}
    with gradients_at(outputs, found.__setitem__):
        model(images).square().sum().backward()
    x = model.stem(images)
    kept = []
    for stage in model.stages:
        for block in stage:
            x = block(x)
            kept.append(x)
    expected = torch.autograd.grad(model.head(model.last(x).mean((2, 3))).square().sum(), kept)
    for index, gradient in enumerate(expected):
        assert torch.allclose(found[index], gradient, rtol=1e-4, atol=1e-7)


def test_stages_follow_the_channels_in_order_of_execution(tiny_unet: MakeRun) -> None:
    (run,) = open_runs([tiny_unet("block-channels")])
    (step,) = CORRELATION.of_run(run, [2], Coverage(3, 2))["steps"]
    # Down: 8 and 16 channels; the two mid blocks and the first two up blocks have 16, the last two up blocks 8.
    assert [(stage["channels"], len(stage["blocks"])) for stage in step["stages"]] == [(8, 1), (16, 5), (8, 2)]
    scale = run.model(2).unit[1].scale.detach().double()
    pairs = torch.corrcoef(scale)[tuple(torch.triu_indices(5, 5, 1))]
    assert step["stages"][1]["maps"]["mean"] == pytest.approx(float(pairs.mean()), abs=1e-3)
    assert step["stages"][0]["maps"]["mean"] is None  # there is no pair of blocks


def test_gradients_with_and_without_unit_are_at_the_same_blocks(tiny_unet: MakeRun) -> None:
    records = [
        GRADIENTS.of_run(run, over=GradientBatches(2)) for run in open_runs([tiny_unet("none"), tiny_unet("dia-lstm")])
    ]
    with_unit, without = ([step["blocks"] for step in record["steps"]] for record in records)
    for a, b in zip(with_unit, without, strict=True):
        assert [block["block"] for block in a] == [block["block"] for block in b]
        assert [block["elements"] for block in a] == [block["elements"] for block in b] and a[0]["mean"] != b[0]["mean"]
