"""What the analyses' commands have in common: options, opening runs, progress, a record with its figure."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dia_diffusion.analysis.options import Coverage
from dia_diffusion.analysis.runs import open_runs
from dia_diffusion.analysis.trained_run import TrainedRun
from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.console import ConsoleReporter, Counter, console
from dia_diffusion.errors import InputError
from dia_diffusion.io import write_json
from dia_diffusion.training.randomness import RANDOMNESS

Record = dict[str, Any]


def parser_of(analysis: str, description: str) -> CommandParser:
    """With what all analyses of runs are told."""
    parser = CommandParser(f"analyze {analysis}", description)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, default=Path("analysis"), help="the folder of the figure and its numbers")
    parser.add_argument("--data", metavar="SOURCE", help="the runs' images, where they are no longer at data.source")
    parser.add_argument("--steps", type=_steps, help="of the runs, such as 2000,24000; all that are kept if none")
    parser.add_argument("--seed", type=int, default=0, help="decides images, times and noise")
    return parser


def _steps(text: str) -> list[int]:
    try:
        return [int(step) for step in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} are no steps; accepted: numbers such as 2000,24000") from None


def checked(parser: CommandParser, arguments: Sequence[str], lowest: dict[str, int]) -> argparse.Namespace:
    """The options. Raises InputError for a number below its lowest, or an --out that is no folder."""
    options = parser.parse_args(arguments)
    for name, least in {"--seed": 0, **lowest}.items():
        value = getattr(options, name[2:].replace("-", "_"))
        if value is not None and value < least:
            raise InputError(f"{name} is {value}; accepted: {least} or more")
    if options.seed >= 2**63:
        raise InputError(f"--seed must be below 2**63, got {options.seed}")
    if options.out.exists() and not options.out.is_dir():
        raise InputError(f"--out {options.out} is no folder")
    return options


def opened(options: argparse.Namespace) -> list[TrainedRun]:
    """The runs that the options name, with their images."""
    reporter = ConsoleReporter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return open_runs(options.runs, options.data, device, partial(reporter.reading, "images"))
    finally:
        reporter.close()


def adding_up(counter: Counter, total: int) -> Callable[[int], None]:
    """Called with how much more is done."""
    done = 0

    def add(amount: int) -> None:
        nonlocal done
        done += amount
        counter(done, total)

    return add


def written(
    options: argparse.Namespace,
    analysis: str,
    protocol: Record,
    measured: list[Record],
    draw: Callable[[list[Record], Path], None],
) -> list[Record]:
    """Writes record and figure. The record first: whatever becomes of the figure, what was measured is kept."""
    protocol = {**protocol, "seed": options.seed, "randomness": RANDOMNESS}
    record = {"analysis": analysis, "protocol": protocol, "runs": measured}
    numbers, figure = options.out / f"{analysis}.json", options.out / f"{analysis}.png"
    write_json(numbers, record)
    draw(measured, figure)
    console.print(f"{figure}, numbers in {numbers}")
    return measured


@dataclass(frozen=True)
class OverImages:
    """An analysis that goes over the same images at the same times in each run."""

    name: str
    description: str
    measure: Callable[[TrainedRun, list[int] | None, Coverage, argparse.Namespace], Record]
    passes: Callable[[TrainedRun, list[int] | None], int]
    """How often it goes over them in a run, at these steps; raises InputError for a run it isn't for."""
    draw: Callable[[list[Record], Path], None]
    images: int = 64
    """The default of --images."""

    def run(
        self,
        arguments: Sequence[str],
        more: Callable[[CommandParser], None] = lambda parser: None,
        lowest: dict[str, int] | None = None,
    ) -> list[Record]:
        """The runs' records, written and drawn.

        more: adds options of the analysis's own; the protocol names them.
        lowest: of those that are numbers.
        """
        parser = parser_of(self.name, self.description)
        common = vars(parser.parse_args(["RUN"])).keys()
        parser.add_argument(
            "--images", type=int, default=self.images, help="images of the training data to average over"
        )
        parser.add_argument(
            "--times", type=int, default=16, help="times, spread as training draws them; a classifier has none"
        )
        more(parser)
        options = checked(parser, arguments, {"--images": 2, "--times": 2, **(lowest or {})})
        runs = opened(options)
        if few := next((run for run in runs if len(run.images) < options.images), None):
            raise InputError(
                f"--images is {options.images}; accepted: 2 to the {len(few.images):,} images of {few.folder.path}"
            )
        total = sum(self.passes(run, options.steps) * run.num_times(options.times) for run in runs) * options.images
        with Counter(f"measuring {self.name}", "images") as counter:
            coverage = Coverage(options.images, options.times, options.seed, progress=adding_up(counter, total))
            measured = [self.measure(run, options.steps, coverage, options) for run in runs]
        own = {name: value for name, value in vars(options).items() if name not in common}
        return written(options, self.name, {**own, "weights": "ema"}, measured, self.draw)
