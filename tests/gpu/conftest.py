"""Tests for CUDA GPUs: `pytest -m gpu -n 0`. Without a GPU, `DIA_TEST_DEVICE=cpu` runs their bodies on the CPU."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dia_diffusion.training.config import Experiment
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.run_folder import read_metrics
from dia_diffusion.training.trainer import Trainer
from tests.training.conftest import TINY, Recorder

HERE = Path(__file__).parent
ON_CPU = os.environ.get("DIA_TEST_DEVICE") == "cpu" and not torch.cuda.is_available()
DEVICE = torch.device("cpu" if ON_CPU else "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")
            if not ON_CPU and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Experiment]:
    """tiny("name", "--train.batch_size", "4") is an uncompiled experiment with run folder tmp_path/name."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    base = ["--train.compile", "false"]
    return lambda name, *options: read_experiment(str(recipe), ["--output", str(tmp_path / name), *base, *options])


def train(experiment: Experiment, at_step: Callable[[int], None] = lambda step: None) -> list[float]:
    """Trains to the end and returns the losses."""
    Trainer(experiment, Recorder(at_step)).run()
    return losses(Path(experiment.output))


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
