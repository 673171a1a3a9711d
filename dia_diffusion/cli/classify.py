"""`dia-diffusion classify`: trains a classifier, or resumes it; under `accelerate launch` as train/classify.py."""

from collections.abc import Sequence
from functools import partial

from dia_diffusion.cli.options import options_parser
from dia_diffusion.cli.train import parse_command, train
from dia_diffusion.training.config import ClassifyExperiment


def parse(arguments: Sequence[str]) -> ClassifyExperiment:
    """The recipe with its overrides."""
    help_parser = partial(options_parser, ClassifyExperiment, "classify")
    return parse_command(arguments, ClassifyExperiment, "classify", help_parser)[1]


def run(experiment: ClassifyExperiment) -> None:
    """Trains the classifier."""
    from dia_diffusion.training.classification import ClassificationTask

    train(ClassificationTask(experiment))
