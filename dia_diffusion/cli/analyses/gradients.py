"""`dia-diffusion analyze gradients` and `gradient-noise`."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dia_diffusion.analysis.figures.gradients import draw_magnitudes, draw_noise
from dia_diffusion.analysis.gradient_noise import noise_of_run
from dia_diffusion.analysis.gradients import gradients_of_run
from dia_diffusion.analysis.trained_run import WEIGHTS, TrainedRun
from dia_diffusion.cli.analyses.common import Record, adding_up, checked, opened, parser_of, written
from dia_diffusion.cli.console import Counter, console


def gradients(arguments: Sequence[str]) -> None:
    """Measures |gradient| at blocks, and prints it at the last step."""
    description = "Measures the size of the loss's gradient at the outputs of blocks (Fig. 13)."
    for record in _over_batches(
        "gradients",
        description,
        arguments,
        gradients_of_run,
        partial(TrainedRun.with_first, in_training=True),
        draw_magnitudes,
        16,
    ):
        last = record["steps"][-1]
        console.print(f"{record['run']}, step {last['step']:,}: |gradient|, mean (deviation), median")
        for block in last["blocks"]:
            if block["quantiles"] is not None:
                middle = block["quantiles"]["0.5"]
                name = f"{block['stage']} {block['block']}".strip()
                console.print(f"  {name}: {block['mean']:.3g} ({block['deviation']:.3g}), {middle:.3g}")


def gradient_noise(arguments: Sequence[str]) -> None:
    """Measures noise scales, and prints those of the last step."""
    description = "Measures how noisy the gradients of a run's batches are."
    for record in _over_batches(
        "gradient-noise", description, arguments, noise_of_run, TrainedRun.choose_steps, draw_noise, 64
    ):
        last = record["steps"][-1]
        groups = ", ".join(f"{name} {_told(group)}" for name, group in last["groups"].items())
        console.print(f"{record['run']}, step {last['step']:,}: noise scale in images: {groups}")


def _over_batches(
    analysis: str,
    description: str,
    arguments: Sequence[str],
    measure: Callable[..., Record],
    steps: Callable[[TrainedRun, Sequence[int] | None, str], list[int]],
    draw: Callable[[list[Record], Path], None],
    batches: int,
) -> list[Record]:
    """The runs' records, written and drawn, of an analysis of the gradients of batches.

    steps: those that it measures in a run, of those asked for, with these weights.
    batches: the default of --batches.
    """
    parser = parser_of(analysis, description)
    parser.add_argument("--batches", type=int, default=batches, help="batches whose gradients are taken")
    parser.add_argument("--batch-size", type=int, help="images a batch; the run's own if none")
    parser.add_argument("--weights", choices=WEIGHTS, default="ema", help="averaged, or the raw ones of checkpoints")
    options = checked(parser, arguments, {"--batches": 2, "--batch-size": 1})
    runs = opened(options)
    total = sum(len(steps(run, options.steps, options.weights)) for run in runs) * options.batches
    with Counter(f"measuring {analysis}", "batches") as counter:
        numbers: dict[str, Any] = {
            "num_batches": options.batches,
            "batch_size": options.batch_size,
            "weights": options.weights,
            "seed": options.seed,
            "progress": adding_up(counter, total),
        }
        measured = [measure(run, options.steps, **numbers) for run in runs]
    return written(options, analysis, {"batches": options.batches, "weights": options.weights}, measured, draw)


def _told(noise: dict[str, float | None]) -> str:
    scale, low, high = (noise[key] for key in ("noise_scale", "noise_scale_low", "noise_scale_high"))
    if scale and low and high:
        return f"{scale:,.0f} [{low:,.0f}, {high:,.0f}]"
    return f"at least {low:,.0f}" if low else "unknown"
