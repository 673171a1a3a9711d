"""`dia-diffusion train`: trains a recipe, or goes on with a run; also under `accelerate launch train/train.py`."""

from collections.abc import Callable, Sequence
from typing import Any

from dia_diffusion.cli.console import ConsoleReporter
from dia_diffusion.errors import InputError, Stopped, number_of
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.recipe import read_experiment, recipe_parser, recipes_folder


def parse(arguments: Sequence[str]) -> Experiment:
    """The recipe with what overrides it."""
    return parse_recipe(arguments, Experiment, help_text)


def parse_recipe(arguments: Sequence[str], kind: type, help_text: Callable[[], str]) -> Any:
    """A recipe of a kind; --help prints `help_text` and exits."""
    arguments = list(arguments)
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(help_text())
        raise SystemExit(0)
    config, overrides = split_config(arguments)
    if config is None:
        raise InputError("--config is missing; give a recipe: a YAML file or the name of a shipped one")
    return read_experiment(config, overrides, kind=kind)


def run(task: Any) -> None:
    """Trains a recipe, or a task made of one."""
    from dia_diffusion.training.loop import Trainer

    reporter = ConsoleReporter()
    try:
        Trainer(task, reporter).run()
    except KeyboardInterrupt as interrupt:  # a second one, or one before the first step
        text = "ended at once; the same command goes on from the last checkpoint that was written"
        raise Stopped(number_of(interrupt), text) from None
    finally:
        reporter.close()


def split_config(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """--config's value, and the other arguments."""
    config, overrides = None, []
    remaining = iter(arguments)
    for argument in remaining:
        name, has_value, value = argument.partition("=")
        if name != "--config":
            overrides.append(argument.replace("--init-from", "--init_from") if name == "--init-from" else argument)
            continue
        config = value if has_value else next(remaining, None)
        if config is None:
            raise InputError("--config needs a recipe: a YAML file or the name of a shipped one")
    return config, overrides


def help_text() -> str:
    """Usage, the shipped recipes and every key."""
    names = ", ".join(sorted(path.stem for path in recipes_folder().glob("*.yaml")))
    keys = recipe_parser().format_help().split("options:")[-1]
    return (
        "usage: dia-diffusion train --config RECIPE [--init-from PIPELINE_OR_RUN] [--KEY VALUE ...]\n"
        "       accelerate launch train/train.py --config RECIPE [--KEY VALUE ...]\n\n"
        "Trains a recipe into the folder `output`; the same command goes on with a run that was stopped.\n"
        f"RECIPE is a YAML file or one of: {names}\n\nkeys:{keys}"
    )
