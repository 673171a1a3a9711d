"""`dia-diffusion analyze`: what the attention unit of trained runs does, as figures and the numbers they show."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dia_diffusion.analysis.attention_maps import maps_of_run, steps_of_maps
from dia_diffusion.analysis.figures import draw_ablations, draw_linearity, draw_maps, draw_noise
from dia_diffusion.analysis.gradient_noise import WEIGHTS, noise_of_run
from dia_diffusion.analysis.map_ablations import REPLACEMENTS, ablations_of_run
from dia_diffusion.analysis.mlp_linearity import linearity_of_run
from dia_diffusion.analysis.trained_run import TrainedRun, open_runs
from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.console import ConsoleReporter, Counter, console
from dia_diffusion.errors import InputError
from dia_diffusion.files import write_json


def run(arguments: Sequence[str]) -> None:
    """Does the analysis that the first argument names with the others."""
    parser = CommandParser("analyze", "Measures what the attention unit of trained runs does.")
    parser.add_argument("analysis", choices=ANALYSES, help="`dia-diffusion analyze ANALYSIS --help` tells its options")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the analysis")
    options = parser.parse_args(arguments)
    ANALYSES[options.analysis](options.arguments)


def _maps(arguments: Sequence[str]) -> None:
    description = "Measures the attention map over depth, times, images and training."
    for record in _over_images("maps", description, arguments, maps_of_run, _passes_of_maps, draw_maps):
        last = record["steps"][-1]
        shares = ", ".join(f"{name} {share:.1%}" for name, share in last["shares"].items())
        by_block = " ".join(f"{mean:.3f}" for mean in last["mean_by_block"])
        console.print(f"{record['run']}, step {last['step']:,}: h by block {by_block}; variance: {shares}")


def _passes_of_maps(run: TrainedRun, steps: list[int] | None) -> int:
    run.require_unit()
    return len(steps_of_maps(run, steps))


def _ablations(arguments: Sequence[str]) -> None:
    description = "Measures the loss with the attention map replaced by what it is on average."
    for record in _over_images(
        "ablations", description, arguments, ablations_of_run, _passes_of_ablations, draw_ablations
    ):
        _tell_losses(record)


def _passes_of_ablations(run: TrainedRun, steps: list[int] | None) -> int:
    run.require_unit()
    return len(run.choose_steps(steps)) * (2 + len(REPLACEMENTS))  # the fit, h itself, its replacements


def _linearity(arguments: Sequence[str]) -> None:
    description = "Measures how linear the MLPs are, and the loss with a straight line in each GELU's place."
    for record in _over_images(
        "linearity", description, arguments, linearity_of_run, _passes_of_linearity, draw_linearity
    ):
        _tell_losses(record)
        last = record["steps"][-1]
        by_block = " ".join(f"{share:.1%}" for share in last["explained_by_block"])
        deviations = " ".join(f"{deviation:.3f}" for deviation in last["input_deviation_by_block"])
        console.print(f"  by block: lines explain {by_block} of GELU's variance; deviation of its input {deviations}")


def _passes_of_linearity(run: TrainedRun, steps: list[int] | None) -> int:
    return len(run.choose_steps(steps)) * 3  # the fit, GELU itself, lines


def _tell_losses(record: dict[str, Any]) -> None:
    last = record["steps"][-1]
    own = last["losses"]["own"]
    console.print(f"{record['run']}, step {last['step']:,}: loss {own['loss']:.4f} ± {own['standard_error']:.4f}")
    for name, other in last["losses"].items():
        if name != "own":
            rise, error = other["difference"] / own["loss"], other["difference_error"] / own["loss"]
            console.print(f"  {name}: {other['loss']:.4f} ({rise:+.2%} ± {error:.2%})")


def _over_images(
    analysis: str,
    description: str,
    arguments: Sequence[str],
    measure: Callable[..., dict[str, Any]],
    passes: Callable[[TrainedRun, list[int] | None], int],
    draw: Callable[[list[dict[str, Any]], Path], None],
) -> list[dict[str, Any]]:
    """The runs' records, written and drawn, of an analysis that goes over the same images at the same times.

    passes: how often it goes over them in a run, at these steps.
    """
    parser = _parser(analysis, description)
    parser.add_argument("--images", type=int, default=64, help="images of the training data to average over")
    parser.add_argument("--times", type=int, default=16, help="times, spread as training draws them")
    options = _checked(parser, arguments, {"--images": 2, "--times": 2})
    runs = _open(options)
    total = sum(passes(each, options.steps) for each in runs) * options.images * options.times
    with Counter(f"measuring {analysis}", "images") as counter:
        numbers = {"num_images": options.images, "num_times": options.times, "seed": options.seed}
        progress = _adding_up(counter, total)
        measured = [measure(each, options.steps, **numbers, progress=progress) for each in runs]
    _write(options, analysis, {"images": options.images, "times": options.times, "weights": "ema"}, measured, draw)
    return measured


def _gradient_noise(arguments: Sequence[str]) -> None:
    parser = _parser("gradient-noise", "Measures how noisy the gradients of a run's batches are.")
    parser.add_argument("--batches", type=int, default=64, help="batches whose gradients are compared")
    parser.add_argument("--batch-size", type=int, help="images a batch; the run's own if none")
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="ema", help="of pipelines, or the raw ones of checkpoints"
    )
    options = _checked(parser, arguments, {"--batches": 2, "--batch-size": 1})
    runs = _open(options)
    total = sum(len(each.choose_steps(options.steps, options.weights)) for each in runs) * options.batches
    with Counter("measuring gradients", "batches") as counter:
        measure = partial(
            noise_of_run,
            steps=options.steps,
            num_batches=options.batches,
            batch_size=options.batch_size,
            weights=options.weights,
            seed=options.seed,
            progress=_adding_up(counter, total),
        )
        measured = [measure(each) for each in runs]
    _write(options, "gradient-noise", {"batches": options.batches, "weights": options.weights}, measured, draw_noise)
    for record in measured:
        last = record["steps"][-1]
        groups = ", ".join(f"{name} {_told(group)}" for name, group in last["groups"].items())
        console.print(f"{record['run']}, step {last['step']:,}: noise scale in images: {groups}")


def _told(noise: dict[str, float | None]) -> str:
    scale, low, high = (noise[key] for key in ("noise_scale", "noise_scale_low", "noise_scale_high"))
    if scale and low and high:
        return f"{scale:,.0f} [{low:,.0f}, {high:,.0f}]"
    return f"at least {low:,.0f}" if low else "unknown"


def _parser(analysis: str, description: str) -> CommandParser:
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


def _checked(parser: CommandParser, arguments: Sequence[str], lowest: dict[str, int]) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    for name, least in {"--seed": 0, **lowest}.items():
        value = getattr(options, name[2:].replace("-", "_"))
        if value is not None and value < least:
            raise InputError(f"{name} is {value}; accepted: {least} or more")
    if options.out.exists() and not options.out.is_dir():
        raise InputError(f"--out {options.out} is no folder")
    return options


def _open(options: argparse.Namespace) -> list[TrainedRun]:
    reporter = ConsoleReporter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return open_runs(options.runs, options.data, device, partial(reporter.reading, "images"))
    finally:
        reporter.close()


def _adding_up(counter: Counter, total: int) -> Callable[[int], None]:
    done = 0

    def add(amount: int) -> None:
        nonlocal done
        done += amount
        counter(done, total)

    return add


def _write(
    options: argparse.Namespace,
    analysis: str,
    protocol: dict[str, Any],
    measured: list[dict[str, Any]],
    draw: Callable[[list[dict[str, Any]], Path], None],
) -> None:
    """The record first: whatever becomes of the figure, what was measured is kept."""
    record = {"analysis": analysis, "protocol": {**protocol, "seed": options.seed}, "runs": measured}
    numbers, figure = options.out / f"{analysis}.json", options.out / f"{analysis}.png"
    write_json(numbers, record)
    draw(measured, figure)
    console.print(f"{figure}, numbers in {numbers}")


ANALYSES = {"maps": _maps, "ablations": _ablations, "linearity": _linearity, "gradient-noise": _gradient_noise}
