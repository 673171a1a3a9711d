"""A finished tiny run for each unit that a test asks for."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dia_diffusion.training.classification import ClassificationTask
from dia_diffusion.training.config import ClassifyExperiment
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.trainer import Trainer
from tests.training.conftest import TINY, Recorder

TINY_CLASSIFIER = """
seed: 0
data: {source: digits, test_split: test, augmentation: pad-crop}
model: {backbone: cifar-resnet20-basic, sample_size: 8, num_classes: 10}
train: {batch_size: 8, max_steps: 4, mixed_precision: none, log_every: 1, evaluate_every: 0, checkpoint_every: 2}
optimizer: {learning_rate: 0.1, schedule: constant}
"""


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_run("dia-lstm") is the folder of a run with pipelines of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("analysis")
    (folder / "tiny.yaml").write_text(TINY)

    def make(unit: str) -> Path:
        if not (folder / unit).exists():
            overrides = ["--output", str(folder / unit), "--model.attention", unit, "--optimizer.learning_rate", "0.05"]
            Trainer(read_experiment(str(folder / "tiny.yaml"), overrides), Recorder()).run()
        return folder / unit

    return make


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_classifier("se") is the folder of a run with classifiers of steps 2 and 4; SE is individual."""
    folder = tmp_path_factory.mktemp("classifiers")
    (folder / "tiny.yaml").write_text(TINY_CLASSIFIER)

    def make(unit: str) -> Path:
        if not (folder / unit).exists():
            overrides = ["--output", str(folder / unit), "--model.attention", unit]
            if unit == "se":
                overrides += ["--model.attention_kwargs", "{sharing: individual, reduction: 4}"]
            experiment = read_experiment(str(folder / "tiny.yaml"), overrides, kind=ClassifyExperiment)
            Trainer(ClassificationTask(experiment), Recorder()).run()
        return folder / unit

    return make
