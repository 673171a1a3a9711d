"""A run small enough to be trained in a second."""

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from dia_diffusion.progress import Progress
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.trainer import Trainer

TINY = """
seed: 0
data: {source: digits, random_flip: true}
model: {sample_size: 8, in_channels: 1, patch_size: 4, hidden_size: 16, num_layers: 3, num_attention_heads: 2}
train: {batch_size: 8, max_steps: 6, mixed_precision: none, log_every: 1, checkpoint_every: 3, sample_every: 0}
optimizer: {learning_rate: 1.0e-3, warmup_steps: 4}
"""
FLOW = ("--noise.schedule", "flow", "--noise.prediction_type", "sample", "--noise.times", "logit-normal")
FLOW += ("--noise.times_kwargs.mean", "-0.5", "--noise.shift", "2")


class Recorder(Progress):
    """Keeps messages and calls a function after each step."""

    def __init__(self, at_step: Callable[[int], None] = lambda step: None):
        self.messages: list[str] = []
        self.at_step = at_step

    def message(self, text: str) -> None:
        self.messages.append(text)

    def update(self, what: str, unit: str, done: int, total: int, note: str = "") -> None:
        if what == "training":
            self.at_step(done)


@pytest.fixture
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Experiment]:
    """tiny("name", "--train.batch_size", "4") is an experiment with its run folder in tmp_path."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    return lambda name, *overrides: read_experiment(str(recipe), ["--output", str(tmp_path / name), *overrides])


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains the tiny recipe, once per set of options."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY)

    @cache
    def run(*overrides: str) -> Path:
        place = folder / str(len(list(folder.iterdir())))
        Trainer(read_experiment(str(recipe), ["--output", str(place), *overrides]), Recorder()).run()
        return place

    return run


@pytest.fixture
def finished(finished_runs: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """finished("name", "--seed", "1") is the folder of a finished tiny run in tmp_path, trained once and copied."""
    return lambda name, *overrides: Path(shutil.copytree(finished_runs(*overrides), tmp_path / name))


@pytest.fixture
def train() -> Callable[..., Trainer]:
    """Trains an experiment to its end."""

    def run(experiment: Experiment, at_step: Callable[[int], None] = lambda step: None) -> Trainer:
        trainer = Trainer(experiment, Recorder(at_step))
        trainer.run()
        return trainer

    return run
