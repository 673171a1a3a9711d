"""ResNet-50s with attached units inside torchvision's detectors: train, save each unit once, load (paper, IV-C)."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn

from dia_diffusion import attach

STAGES = {256: 3, 512: 4, 1024: 6, 2048: 3}  # channels -> bottlenecks of a ResNet-50


def detector(build: Callable[..., nn.Module], seed: int) -> tuple[nn.Module, int]:
    """A detector with DIA-LSTM on its backbone, and its number of parameters without the unit."""
    torch.manual_seed(seed)
    size = {"min_size": 64, "max_size": 64}
    model = build(weights=None, weights_backbone=None, num_classes=3, **size)
    plain = sum(p.numel() for p in model.parameters())
    attach(model, "dia-lstm", reduction=16)
    return model, plain


@pytest.mark.parametrize(
    "build", [retinanet_resnet50_fpn, pytest.param(fasterrcnn_resnet50_fpn, marks=pytest.mark.long)]
)
def test_detector_trains_and_reloads(build: Callable[..., nn.Module], tmp_path: Path) -> None:
    model, plain = detector(build, seed=0)
    # 10 N^2 / r weights and 2 N / r + 8 N biases per unit, one unit per stage (III-C).
    added = sum(10 * n * n // 16 + 2 * n // 16 + 8 * n for n in STAGES)
    assert sum(p.numel() for p in model.parameters()) == plain + added

    calls = []
    for unit in model.attention_units:
        unit.register_forward_hook(lambda unit, given, _: calls.append((unit.channels, given[1] is None)))
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}
    losses = model.train()(images, [target, target])
    sum(losses.values()).backward()
    # One call per bottleneck, stage by stage; the state restarts with each stage.
    assert calls == [(n, block == 0) for n, blocks in STAGES.items() for block in range(blocks)]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.attention_units.parameters())
    assert all(any(p.grad.any() for p in unit.parameters()) for unit in model.attention_units)

    save_file(model.state_dict(), tmp_path / "detector.safetensors")  # raises an error for shared tensors
    again, _ = detector(build, seed=1)
    again.load_state_dict(load_file(tmp_path / "detector.safetensors"))
    with torch.no_grad():
        first, second = (network.eval()(images) for network in (model, again))
    for found, same in zip(first, second, strict=True):
        assert all(torch.equal(found[key], same[key]) for key in ("boxes", "labels", "scores"))
