"""`dia-diffusion classify`: trains a classifier, or goes on with it; under `accelerate launch` as train/classify.py."""

from collections.abc import Sequence

from dia_diffusion.cli import train
from dia_diffusion.cli.train import parse_recipe
from dia_diffusion.training.classify_config import ClassifyExperiment
from dia_diffusion.training.recipe import recipe_parser, recipes_folder


def parse(arguments: Sequence[str]) -> ClassifyExperiment:
    """The recipe with what overrides it."""
    experiment: ClassifyExperiment = parse_recipe(arguments, ClassifyExperiment, help_text)
    return experiment


def run(experiment: ClassifyExperiment) -> None:
    """Trains the classifier."""
    from dia_diffusion.training.classification import ClassificationTask

    train.run(ClassificationTask(experiment))


def help_text() -> str:
    """Usage, the shipped recipes and every key."""
    names = ", ".join(sorted(path.stem for path in recipes_folder(ClassifyExperiment).glob("*.yaml")))
    keys = recipe_parser(ClassifyExperiment).format_help().split("options:")[-1]
    return (
        "usage: dia-diffusion classify --config RECIPE [--KEY VALUE ...]\n"
        "       accelerate launch train/classify.py --config RECIPE [--KEY VALUE ...]\n\n"
        "Trains a classifier into the folder `output`; the same command goes on with a run that was stopped.\n"
        f"RECIPE is a YAML file or one of: {names}\n\nkeys:{keys}"
    )
