"""A finished tiny run of each kind, for each requested unit."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dia_diffusion.analysis.run import TrainedRun
from dia_diffusion.training.classification import ClassificationTask
from dia_diffusion.training.config import ClassifyExperiment
from dia_diffusion.training.randomness import StepDraws
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.trainer import Trainer
from tests.training.conftest import TINY, Recorder

MakeRun = Callable[[str], Path]

TINY_UNET = """
seed: 0
data: {source: digits}
model:
  backbone: unet2d
  sample_size: 8
  in_channels: 1
  backbone_kwargs:
    block_out_channels: [8, 16]
    layers_per_block: 1
    down_block_types: [DownBlock2D, DownBlock2D]
    up_block_types: [UpBlock2D, UpBlock2D]
    norm_num_groups: 4
train: {batch_size: 8, max_steps: 2, mixed_precision: none, log_every: 1, checkpoint_every: 2, sample_every: 0}
optimizer: {warmup_steps: 0}
"""
TINY_CLASSIFIER = """
seed: 0
data: {source: digits, test_split: test, augmentation: pad-crop}
model: {backbone: cifar-resnet20-basic, sample_size: 8, num_classes: 10}
train: {batch_size: 8, max_steps: 4, mixed_precision: none, log_every: 1, evaluate_every: 0, checkpoint_every: 2}
optimizer: {learning_rate: 0.1, schedule: constant}
"""


def noisy(run: TrainedRun, draws: StepDraws, image: int, u: float) -> tuple[Tensor, Tensor]:
    """A drawn image (1, C, H, W) noised at time u in (0, 1) by vp-continuous, and the network's time (1,)."""
    alpha = np.exp(-(0.1 * u + 19.9 * u**2 / 2) / 2)
    x = torch.from_numpy(run.images.images[draws.indices[image]]).float() / 127.5 - 1
    x = x.flip(-1) if draws.flips[image] else x
    return (alpha * x + (1 - alpha**2) ** 0.5 * draws.noise[image])[None], torch.tensor([999 * u])


def train(folder: Path, recipe: str, unit: str) -> Path:
    """The folder of a run of this recipe with this unit, trained if it doesn't exist yet."""
    run = folder / unit
    if run.exists():
        return run
    (folder / "recipe.yaml").write_text(recipe)
    overrides = ["--output", str(run), "--model.attention", unit]
    if recipe != TINY_CLASSIFIER:
        overrides += ["--optimizer.learning_rate", "0.05"]
        Trainer(read_experiment(str(folder / "recipe.yaml"), overrides), Recorder()).run()
        return run
    if unit == "se":
        overrides += ["--model.attention_kwargs", "{sharing: individual, reduction: 4}"]
    experiment = read_experiment(str(folder / "recipe.yaml"), overrides, kind=ClassifyExperiment)
    Trainer(ClassificationTask(experiment), Recorder()).run()
    return run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """tiny_run("dia-lstm") is the folder of a UViT run with pipelines at steps 3 and 6."""
    return partial(train, tmp_path_factory.mktemp("uvit"), TINY)


@pytest.fixture(scope="session")
def tiny_unet(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """tiny_unet("dia-lstm") is the folder of a UNet run with a pipeline at step 2."""
    return partial(train, tmp_path_factory.mktemp("unet"), TINY_UNET)


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """tiny_classifier("se") is the folder of a run with classifiers at steps 2 and 4; SE has individual sharing."""
    return partial(train, tmp_path_factory.mktemp("classifier"), TINY_CLASSIFIER)
