"""`dia-diffusion train`: trains a recipe, or goes on with a run; also under `accelerate launch train/train.py`."""

from collections.abc import Callable, Sequence
from typing import Any

from dia_diffusion.cli.console import ConsoleReporter
from dia_diffusion.cli.imports import imports
from dia_diffusion.errors import InputError, Stopped, number_of
from dia_diffusion.evaluation.protocols import protocol_names, read_protocol
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.recipe import read_experiment, recipe_parser, recipes_folder


def run(arguments: Sequence[str]) -> None:
    """Trains what the arguments say."""
    protocol, rest = take_option(arguments, "--evaluate")
    every, rest = take_option(rest, "--evaluate-every")
    if every is not None and (protocol is None or not every.isdecimal() or int(every) < 1):
        raise InputError(f"`--evaluate-every` must be 1 or more, beside --evaluate, got {every}")
    named = None if protocol is None else read_protocol(protocol)

    def callbacks() -> list[Any]:
        from dia_diffusion.evaluation.callback import EvaluatePipelines

        return [] if named is None else [EvaluatePipelines(named, None if every is None else int(every))]

    run_recipe(rest, Experiment, help_text, lambda experiment: experiment, callbacks)


def run_recipe(
    arguments: Sequence[str],
    kind: type,
    help_text: Callable[[], str],
    trained: Callable[[Any], Any],
    callbacks: Callable[[], list[Any]] = list,
) -> None:
    """Trains a recipe of a kind; `trained` makes of it what the Trainer takes, with further callbacks."""
    arguments = list(arguments)
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(help_text())
        return
    config, overrides = split_config(arguments)
    if config is None:
        raise InputError("--config is missing; give a recipe: a YAML file or the name of a shipped one")
    experiment = read_experiment(config, overrides, kind=kind)

    with imports():
        from dia_diffusion.training.trainer import Trainer
    reporter = ConsoleReporter()
    try:
        Trainer(trained(experiment), reporter, callbacks()).run()
    except KeyboardInterrupt as interrupt:  # a second one, or one before the first step
        text = "ended at once; the same command goes on from the last checkpoint that was written"
        raise Stopped(number_of(interrupt), text) from None
    finally:
        reporter.close()


def take_option(arguments: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """An option's value, None if it is not given, and the other arguments."""
    value, others = None, []
    remaining = iter(arguments)
    for argument in remaining:
        name, has_value, text = argument.partition("=")
        if name != option:
            others.append(argument)
        elif (value := text if has_value else next(remaining, None)) is None:
            raise InputError(f"`{option}` must have a value")
    return value, others


def split_config(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """--config's value, and the other arguments."""
    config, others = take_option(arguments, "--config")
    return config, [argument.replace("--init-from", "--init_from", 1) for argument in others]


def help_text() -> str:
    """Usage, the shipped recipes and every key."""
    names = ", ".join(sorted(path.stem for path in recipes_folder().glob("*.yaml")))
    keys = recipe_parser().format_help().split("options:")[-1]
    return (
        "usage: dia-diffusion train --config RECIPE [--init-from PIPELINE_OR_RUN] "
        "[--evaluate PROTOCOL [--evaluate-every N]] [--KEY VALUE ...]\n"
        "       accelerate launch train/train.py --config RECIPE [--KEY VALUE ...]\n\n"
        "Trains a recipe into the folder `output`; the same command resumes a run that was stopped.\n"
        "--evaluate measures each checkpoint, or every Nth step of them, as fid --protocol does.\n"
        f"PROTOCOL is a YAML file or one of: {', '.join(protocol_names())}\n"
        f"RECIPE is a YAML file or one of: {names}\n\nkeys:{keys}"
    )
