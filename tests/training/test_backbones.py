"""Recipes whose backbone is a network of diffusers train as those of a UViT do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from dia_diffusion import AttachedModel, UViTPipeline
from dia_diffusion.analysis.stages import attended_stages
from dia_diffusion.errors import InputError
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.report.subjects import describe
from dia_diffusion.sharing.card import write_card
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.diffusion import build_model
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.run_folder import read_metrics
from dia_diffusion.training.trainer import Trainer
from tests.training.conftest import Recorder
from tests.training.test_processes import in_float64, launch
from tests.training.test_processes import losses as losses_of

KWARGS = {
    "unet2d": "{block_out_channels: [8, 16], down_block_types: [DownBlock2D, AttnDownBlock2D], layers_per_block: 1, "
    "up_block_types: [AttnUpBlock2D, UpBlock2D], norm_num_groups: 4, attention_head_dim: 4}",
    "dit": "{num_attention_heads: 2, attention_head_dim: 8, num_layers: 2, patch_size: 4}",
}
TINY = """
seed: 0
data: {{source: digits}}
model: {{backbone: {backbone}, sample_size: 8, in_channels: 1, backbone_kwargs: {kwargs}}}
train: {{batch_size: 8, max_steps: 4, mixed_precision: none, log_every: 1, checkpoint_every: 2, sample_every: 0}}
optimizer: {{learning_rate: 1.0e-3, warmup_steps: 4}}
"""
BOTH = pytest.mark.parametrize("backbone", KWARGS)
Recipe = Callable[..., Experiment]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """recipe("dit", "name", "--train.batch_size", "4") is an experiment with its run folder in tmp_path."""

    def read(backbone: str, name: str, *overrides: str) -> Experiment:
        file = tmp_path / f"{backbone}.yaml"
        file.write_text(TINY.format(backbone=backbone, kwargs=KWARGS[backbone]))
        return read_experiment(str(file), ["--output", str(tmp_path / name), *overrides])

    return read


def weights(experiment: Experiment, step: int = 4) -> dict[str, torch.Tensor]:
    return load_file(Path(experiment.output) / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def losses(experiment: Experiment) -> list[float]:
    return [line["loss"] for line in read_metrics(Path(experiment.output) / "metrics.jsonl")]


@BOTH
def test_a_run_goes_on_exactly_and_leaves_pipelines(
    recipe: Recipe, train: Callable[..., Trainer], backbone: str
) -> None:
    by_class = ["--model.num_classes", "10", "--data.label_dropout", "0.2", "--model.attention", "srm"]
    whole = recipe(backbone, "whole", *by_class)
    train(whole)
    train(recipe(backbone, "part", *by_class, "--train.max_steps", "2"))
    part = recipe(backbone, "part", *by_class)
    train(part)
    torch.testing.assert_close(weights(whole), weights(part), rtol=0, atol=0)
    folder = Path(whole.output) / "pipelines" / "step-00000004"
    pipeline = UViTPipeline.from_pretrained(folder)
    assert isinstance(pipeline.unet, AttachedModel) and pipeline.unet.num_classes == 10
    assert len(attended_stages(pipeline.unet)) == (3 if backbone == "unet2d" else 1)
    card = (folder / "README.md").read_text()
    assert f"tags: [dia-diffusion, {backbone}, diffusion]" in card and "8x8 images) with the unit `srm`" in card
    write_card(folder)
    assert describe(whole).endswith("on 8x8 images, attention unit srm")


@BOTH
def test_recomputation_trains_the_same(recipe: Recipe, train: Callable[..., Trainer], backbone: str) -> None:
    plain, again = recipe(backbone, "plain"), recipe(backbone, "again", "--train.gradient_checkpointing", "true")
    train(plain), train(again)
    assert losses(again) == pytest.approx(losses(plain), rel=1e-6)


@BOTH
def test_two_processes_train_what_one_does(tmp_path: Path, backbone: str) -> None:
    of_uvit = {"patch_size": 2, "hidden_size": 512, "num_layers": 13, "num_attention_heads": 8}  # the defaults
    options = [word for key, value in of_uvit.items() for word in (f"--model.{key}", str(value))]
    options += ["--model.backbone", backbone, "--model.backbone_kwargs", KWARGS[backbone]]
    one = launch(tmp_path, "one", 1, *options, prepare=in_float64)
    two = launch(tmp_path, "two", 2, *options, "--train.gradient_checkpointing", "true", prepare=in_float64)
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-9)


@BOTH
def test_first_weights_without_a_unit_gain_one(recipe: Recipe, train: Callable[..., Trainer], backbone: str) -> None:
    none = recipe(backbone, "none", "--model.attention", "none")
    train(none)
    gained = recipe(backbone, "gained", "--init_from", none.output, "--optimizer.unit_learning_rate", "1e-2")
    trainer = Trainer(gained, Recorder())
    theirs = UViTPipeline.from_pretrained(Path(none.output) / "pipelines" / "step-00000004").unet.state_dict()
    own = trainer.model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in theirs.items()) and len(own) > len(theirs)
    trainer.run()
    assert trainer.optimizer.param_groups[1]["lr"] == pytest.approx(1e-2)
    with pytest.raises(InputError, match=r"model.attention` must be dia-lstm, as of the shared unit of init_from"):
        Trainer(recipe(backbone, "other", "--init_from", gained.output, "--model.attention", "srm"), Recorder())


def test_first_weights_of_a_pipeline_of_diffusers(recipe: Recipe, tmp_path: Path) -> None:
    experiment = recipe("unet2d", "run", "--init_from", str(tmp_path / "ddpm"))
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
    other = recipe("unet2d", "two", "--init_from", str(tmp_path / "ddpm"), "--model.backbone_kwargs", str(changed))
    with pytest.raises(InputError, match=r"`model.backbone_kwargs.norm_num_groups` must be 4, .* got 2"):
        Trainer(other, Recorder())


@BOTH
def test_twins_start_alike(recipe: Recipe, backbone: str) -> None:
    found = []
    for unit in ("none", "dia-lstm", "srm"):
        torch.manual_seed(0)
        model = build_model(recipe(backbone, "run", "--model.attention", unit).model)
        found.append({name: w for name, w in model.state_dict().items() if "attention_units" not in name})
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["--model.patch_size", "4"], "`model.patch_size` must be left out for backbone unet2d, got 4"),
        (["--model.pool_tokens", "patch"], "`model.pool_tokens` must be left out for backbone unet2d, got 'patch'"),
        (["--model.backbone", "uvit"], "`model.backbone_kwargs` must be left out for backbone uvit"),
        (["--model.backbone", "resnet"], "backbone"),
    ],
)
def test_keys_of_the_other_backbone_are_refused(recipe: Recipe, overrides: list[str], error: str) -> None:
    with pytest.raises(InputError, match=error):
        recipe("unet2d", "run", *overrides)


def test_shipped_recipes_have_the_published_sizes() -> None:
    # Ho et al. 2020, Appendix B: 35.7 million.
    counts = {"cifar10_unet2d": 35_746_307, "cifar10_unet2d_dia": 35_746_307 + 2 * 44_144 + 161_824}
    with torch.device("meta"):
        for name, count in counts.items():
            assert sum(p.numel() for p in build_model(read_experiment(name).model).parameters()) == count
