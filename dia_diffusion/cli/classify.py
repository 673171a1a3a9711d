"""`dia-diffusion classify`: trains a classifier, or goes on with it; under `accelerate launch` as train/classify.py."""

from collections.abc import Sequence

from dia_diffusion.cli.console import ConsoleReporter
from dia_diffusion.cli.train import split_config
from dia_diffusion.errors import InputError
from dia_diffusion.training.classify_config import ClassifyExperiment
from dia_diffusion.training.recipe import read_experiment, recipe_parser, recipes_folder


def run(arguments: Sequence[str]) -> None:
    """Trains what the arguments say."""
    arguments = list(arguments)
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(help_text())
        return
    config, overrides = split_config(arguments)
    if config is None:
        raise InputError("--config is missing; give a recipe: a YAML file or the name of a shipped one")
    experiment = read_experiment(config, overrides, kind=ClassifyExperiment)

    from dia_diffusion.training.classification import ClassificationTask
    from dia_diffusion.training.loop import Trainer

    reporter = ConsoleReporter()
    try:
        Trainer(ClassificationTask(experiment), reporter).run()
    finally:
        reporter.close()


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
