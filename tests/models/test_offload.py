"""Units work with tools that replace or hook modules: offloading by diffusers and accelerate, and LoRA."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor, nn

from dia_diffusion import AttachedModel, UViT
from dia_diffusion.attention import UNITS, build_attention
from dia_diffusion.models.attach import attach
from tests.attention.networks import tiny_unet

SMALL = {"sample_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "num_layers": 5}
X, TIMESTEP = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 500])


UVITS = {
    **{name: {"attention": name} for name in UNITS},
    "norms": {"attention": "srm", "attention_kwargs": {"sharing": "individual"}},
    "blocks": {"attention": "dia-lstm", "skip_scaling": "learned", "qk_norm": True},
}
MODELS = (*UVITS, "attached", "stages")


def build(name: str) -> nn.Module:
    """A UViT with options `UVITS[name]`, or a UNet with a unit per stage, bare ("stages") or wrapped ("attached")."""
    torch.manual_seed(0)
    model: nn.Module
    if name in ("attached", "stages"):
        model = tiny_unet()
        attach(model, "dia-lstm")
        model = AttachedModel.from_backbone(model) if name == "attached" else model
    else:
        model = UViT(**SMALL, num_attention_heads=2, **UVITS[name])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    return model(X, TIMESTEP).sample


@pytest.mark.parametrize("name", MODELS)
def test_sequential_offload(name: str) -> None:
    model = build(name)
    expected = run(model)
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)  # as enable_sequential_cpu_offload() does
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.equal(run(model), expected)


@pytest.fixture
def offloaded_is_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Simulates group offloading on one device: tensors that aren't loaded are filled with nan."""
    kept: dict[Tensor, Tensor] = {}

    def tensors(group: ModuleGroup) -> Iterator[Tensor]:
        for module in group.modules:
            yield from module.parameters()
            yield from module.buffers()
        yield from group.parameters
        yield from group.buffers

    def offload(group: ModuleGroup) -> None:
        for tensor in tensors(group):
            if tensor.is_floating_point() and tensor not in kept:
                kept[tensor] = tensor.data
                tensor.data = torch.full_like(tensor, float("nan"))

    def onload(group: ModuleGroup) -> None:
        for tensor in tensors(group):
            if tensor in kept:
                tensor.data = kept.pop(tensor)

    monkeypatch.setattr(ModuleGroup, "offload_", offload)
    monkeypatch.setattr(ModuleGroup, "onload_", onload)
    yield


@pytest.mark.usefixtures("offloaded_is_nan")
@pytest.mark.parametrize(
    ("name", "blocks"), [*((name, None) for name in MODELS), *((name, 2) for name in ("dia-lstm", "srm", "attached"))]
)
def test_group_offload(name: str, blocks: int | None) -> None:
    model = build(name)
    expected = run(model)
    kind = "leaf_level" if blocks is None else "block_level"
    apply_group_offloading(model, torch.device("cpu"), offload_type=kind, num_blocks_per_group=blocks)
    assert any(parameter.isnan().all() for parameter in model.parameters())
    for _ in range(2):
        assert torch.equal(run(model), expected)


def test_a_unit_offloaded_to_disk_keeps_the_outputs(tmp_path: Path) -> None:
    model = build("srm")
    expected = run(model)
    parts = [name for name, module in model.named_children() if not isinstance(module, nn.ModuleList)]
    blocks = [f"{part}.{index}" for part in ("in_blocks", "out_blocks") for index in range(2)]
    device_map = {name: "disk" if name == "unit" else "cpu" for name in [*parts, *blocks]}
    with pytest.warns(UserWarning, match="pos_embed"):  # accelerate's check of the map takes it for a module
        dispatch_model(model, {**device_map, "pos_embed": "cpu"}, main_device="cpu", offload_dir=tmp_path)
    assert {parameter.device.type for parameter in model.unit.parameters()} == {"meta"}
    assert torch.equal(run(model), expected)


class LowRank(nn.Module):
    """Replaces a linear layer, like peft's LoRA."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", ["dia-lstm", "dia-lstm-light", "lstm", "se", "cbam", "spa", "sem"])
def test_low_rank_adapters_are_added_to_the_weights(name: str) -> None:
    torch.manual_seed(0)
    unit = build_attention(name, 64)
    merged = copy.deepcopy(unit)
    features = torch.randn(2, 4, 64)
    before, _ = unit(features)
    layers = [path for path, module in unit.named_modules() if isinstance(module, nn.Linear)]
    for path in layers:
        adapter = LowRank(unit.get_submodule(path))
        unit.set_submodule(path, adapter)
        with torch.no_grad():
            merged.get_submodule(path).weight += adapter.up.weight @ adapter.down.weight
    after, _ = unit(features)
    torch.testing.assert_close(after, merged(features)[0])
    assert (after - before).abs().max() > 1e-3
