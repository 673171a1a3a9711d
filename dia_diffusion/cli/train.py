"""`dia-diffusion train`: trains a recipe, or resumes a run; also under `accelerate launch train/train.py`."""

import argparse
import ast
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dia_diffusion.cli.console import ConsoleProgress
from dia_diffusion.cli.options import OptionParser, options_parser
from dia_diffusion.errors import InputError, Stopped, number_of
from dia_diffusion.training.config import Experiment, ModelConfig
from dia_diffusion.training.recipe import R, parse_recipe, recipe_names

MODELS = Path(__file__).parents[1] / "models"


@dataclass(frozen=True)
class Options:
    """The options of `train`."""

    experiment: Experiment
    evaluate: str | None
    """The protocol to measure checkpoints with."""
    evaluate_every: int | None


def parse(arguments: Sequence[str]) -> Options:
    """The recipe with its overrides; `model:` is checked only when the recipe runs."""
    own, experiment = parse_command(arguments, Experiment, "train", train_help, ("--evaluate", "--evaluate-every"))
    every = own.evaluate_every
    if every is not None and own.evaluate is None:
        raise InputError("`--evaluate-every` must be left out without `--evaluate`")
    if every is not None and not re.fullmatch(r"[1-9]\d{0,17}", every):
        raise InputError(f"`--evaluate-every` must be 1 or more, got {every}")
    if every is not None and int(every) % (saved := experiment.train.checkpoint_every):
        raise InputError(f"`--evaluate-every` must be a multiple of train.checkpoint_every, {saved}, got {every}")
    return Options(experiment, own.evaluate, None if every is None else int(every))


def train_help() -> OptionParser:
    """All options of the command, for --help."""
    parser = options_parser(Experiment, "train")
    uvit = parser.add_argument_group("model of backbone uvit")
    for key, default, text in documented_arguments(MODELS / "uvit.py", "UViT"):
        if key not in ModelConfig.model_fields:
            uvit.add_argument(f"--model.{key}", metavar=key.upper(), help=f"{text} (default: {default})")
    others = parser.add_argument_group("model of the other backbones")
    for key, default, text in documented_arguments(MODELS / "attached.py", "AttachedModel"):
        if key in ("backbone_kwargs", "attention_at"):
            others.add_argument(f"--model.{key}", metavar=key.upper(), help=f"{text} (default: {default})")
    parser.add_argument("--evaluate", metavar="PROTOCOL", help="measure checkpoints as `fid --protocol` does")
    parser.add_argument("--evaluate-every", metavar="N", help="only those of every Nth step, and the last")
    return parser


def run(options: Options) -> None:
    """Trains the recipe."""
    callbacks = []
    if options.evaluate is not None:
        from dia_diffusion.evaluation.callback import EvaluatePipelines
        from dia_diffusion.evaluation.protocol import EvalProtocol

        callbacks.append(EvaluatePipelines(EvalProtocol.read(options.evaluate), options.evaluate_every))
    train(options.experiment, callbacks)


def train(task: Any, callbacks: Sequence[Any] = ()) -> None:
    """Trains a recipe, or a task made of one, with progress on the terminal."""
    from dia_diffusion.training.trainer import Trainer

    with ConsoleProgress() as progress:
        try:
            Trainer(task, progress, callbacks).run()
        except KeyboardInterrupt as interrupt:  # a second interrupt, or one before the first step
            text = "stopped immediately; the same command resumes from the last checkpoint"
            raise Stopped(number_of(interrupt), text) from None


def parse_command(
    arguments: Sequence[str],
    kind: type[R],
    command: str,
    help_parser: Callable[[], OptionParser],
    own_options: Sequence[str] = (),
) -> tuple[argparse.Namespace, R]:
    """The command's own options, and the recipe of --config with its overrides; --help prints all of them and exits."""
    if not arguments or {"-h", "--help"} & {*arguments}:
        parser = help_parser()
        parser.usage = (
            f"dia-diffusion {command} --config RECIPE [--KEY VALUE ...]\n"
            f"       accelerate launch train/{command}.py --config RECIPE [--KEY VALUE ...]"
        )
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.description = (
            "Trains a recipe into the folder `output`; the same command resumes a run that was stopped.\n"
            f"RECIPE is a YAML file or one of: {recipe_names(kind)}"
        )
        print(parser.format_help())
        raise SystemExit(0)
    parser = OptionParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", required=True)
    for option in own_options:
        parser.add_argument(option)
    options, overrides = parser.parse_known_args(arguments)
    return options, parse_recipe(options.config, overrides, kind=kind)


def documented_arguments(file: Path, class_name: str) -> Iterator[tuple[str, str, str]]:
    """Name, default and description of a class's arguments, from its source: importing it would import torch."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    kind = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == class_name)
    signature = next(node.args for node in kind.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    described = (ast.get_docstring(kind) or "").partition("Args:\n")[2].partition("\n\n")[0]
    texts = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", described, re.MULTILINE))
    for argument, default in zip(signature.args[1:], signature.defaults, strict=True):
        value = ast.unparse(default).strip("'")
        shown = {"None": "null", "True": "true", "False": "false"}.get(value, value)
        yield argument.arg, shown, " ".join(texts[argument.arg].split()).replace("%", "%%")
