"""Recipes with a diffusers network as backbone train like those with a UViT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from dia_diffusion import AttachedModel, UViTPipeline
from dia_diffusion.analysis.stages import attended_stages
from dia_diffusion.errors import InputError
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.report.subjects import describe
from dia_diffusion.sharing.card import write_card
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.diffusion import build_model
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.trainer import Trainer
from tests.training.conftest import Recorder

KWARGS = {
    "unet2d": "{block_out_channels: [8, 16], down_block_types: [DownBlock2D, AttnDownBlock2D], layers_per_block: 1, "
    "up_block_types: [AttnUpBlock2D, UpBlock2D], norm_num_groups: 4, attention_head_dim: 4}",
    "dit": "{num_attention_heads: 2, attention_head_dim: 8, num_layers: 2, patch_size: 4}",
}
# Defaults of the UViT keys that the tiny recipe sets.
USUAL = ("--model.patch_size", "2", "--model.hidden_size", "512", "--model.num_layers", "13")
USUAL += ("--model.num_attention_heads", "8")
BACKBONES = {
    name: (*USUAL, "--model.backbone", name, "--model.backbone_kwargs", kwargs) for name, kwargs in KWARGS.items()
}
BY_CLASS = ("--model.num_classes", "10", "--data.label_dropout", "0.2")
BOTH = pytest.mark.parametrize("backbone", BACKBONES)
Tiny = Callable[..., Experiment]


@BOTH
def test_a_run_leaves_pipelines(backbone: str, finished: Callable[..., Path]) -> None:
    run = finished("run", *BACKBONES[backbone], *BY_CLASS, "--model.attention", "srm")
    folder = run / "pipelines" / "step-00000006"
    pipeline = UViTPipeline.from_pretrained(folder)
    assert isinstance(pipeline.unet, AttachedModel) and pipeline.unet.num_classes == 10
    assert len(attended_stages(pipeline.unet)) == (3 if backbone == "unet2d" else 1)
    card = (folder / "README.md").read_text()
    assert f"tags: [dia-diffusion, {backbone}, diffusion]" in card and "8x8 images) with the unit `srm`" in card
    write_card(folder)
    assert describe(read_experiment(str(run / "config.yaml"))).endswith("on 8x8 images, attention unit srm")


@BOTH
def test_first_weights_without_a_unit_gain_one(backbone: str, finished: Callable[..., Path], tiny: Tiny) -> None:
    none = finished("none", *BACKBONES[backbone], "--model.attention", "none")
    options = (*BACKBONES[backbone], "--optimizer.unit_learning_rate", "1e-2", "--train.max_steps", "4")
    trainer = Trainer(tiny("gained", *options, "--init_from", str(none)), Recorder())
    theirs = UViTPipeline.from_pretrained(none / "pipelines" / "step-00000006").unet.state_dict()
    own = trainer.model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in theirs.items()) and len(own) > len(theirs)
    trainer.run()
    assert trainer.optimizer.param_groups[1]["lr"] == pytest.approx(1e-2)
    start = ("--init_from", str(trainer.folder.path), "--model.attention", "srm")
    with pytest.raises(InputError, match=r"model.attention` must be dia-lstm to match the shared unit of init_from"):
        Trainer(tiny("other", *BACKBONES[backbone], *start))


def test_first_weights_of_a_pipeline_of_diffusers(tiny: Tiny, tmp_path: Path) -> None:
    start = (*BACKBONES["unet2d"], "--init_from", str(tmp_path / "ddpm"))
    experiment = tiny("run", *start)
    arguments: dict[str, Any] = experiment.model.backbone_kwargs or {}
    torch.manual_seed(1)
    network = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **arguments)
    scheduler = DDPMScheduler(**NoiseProcess(experiment.noise.schedule).scheduler_config())
    DDPMPipeline(network, scheduler).save_pretrained(tmp_path / "ddpm")
    model = Trainer(experiment, Recorder()).model
    expected = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in expected.items())
    changed = {**arguments, "norm_num_groups": 2}
    with pytest.raises(InputError, match=r"`model.backbone_kwargs.norm_num_groups` must be 4 to match .*, got 2"):
        Trainer(tiny("two", *start, "--model.backbone_kwargs", str(changed)), Recorder())


def test_shipped_recipes_have_the_published_sizes() -> None:
    # Ho et al. 2020, Appendix B: 35.7 million.
    counts = {"cifar10_unet2d": 35_746_307, "cifar10_unet2d_dia": 35_746_307 + 2 * 44_144 + 161_824}
    with torch.device("meta"):
        for name, count in counts.items():
            assert sum(p.numel() for p in build_model(read_experiment(name).model).parameters()) == count
