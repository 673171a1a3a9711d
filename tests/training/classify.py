"""A classification small enough to be trained in a second."""

from collections.abc import Callable
from pathlib import Path

from dia_diffusion.training.classification import ClassificationTask
from dia_diffusion.training.config import ClassifyExperiment
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.trainer import Trainer
from tests.training.conftest import Recorder

TINY = """
seed: 0
data: {source: digits, augmentation: pad-crop}
model: {backbone: cifar-resnet8-basic, sample_size: 8, num_classes: 10, attention: dia-lstm}
train: {batch_size: 16, max_steps: 6, mixed_precision: none, log_every: 1, evaluate_every: 3, checkpoint_every: 3}
optimizer: {learning_rate: 0.05, nesterov: true, weight_decay: 1.0e-3, milestones: [2, 4], warmup_steps: 2}
"""


def tiny(folder: Path, name: str, *overrides: str) -> ClassifyExperiment:
    """The tiny recipe with its run in folder/name."""
    recipe = folder / "classify.yaml"
    recipe.write_text(TINY)
    return read_experiment(str(recipe), ["--output", str(folder / name), *overrides], kind=ClassifyExperiment)


def train(experiment: ClassifyExperiment, at_step: Callable[[int], None] = lambda step: None) -> Trainer:
    """Trains the experiment to its end."""
    trainer = Trainer(ClassificationTask(experiment), Recorder(at_step))
    trainer.run()
    return trainer
