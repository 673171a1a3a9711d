"""`dia-diffusion analyze ablations` and `linearity`: losses with a part of the network replaced."""

from collections.abc import Sequence
from typing import Any

from dia_diffusion.analysis.figures.losses import draw_ablations, draw_linearity
from dia_diffusion.analysis.map_ablations import REPLACEMENTS, ablations_of_run
from dia_diffusion.analysis.mlp_linearity import linearity_of_run
from dia_diffusion.analysis.trained_run import TrainedRun
from dia_diffusion.cli.analyses.common import OverImages
from dia_diffusion.cli.console import console


def ablations(arguments: Sequence[str]) -> None:
    """Replaces h by its means, and prints the losses of the last step."""
    analysis = OverImages(
        "ablations",
        "Measures the loss with the attention map replaced by what it is on average.",
        lambda run, steps, coverage, _: ablations_of_run(run, steps, coverage),
        _passes_of_ablations,
        draw_ablations,
    )
    for record in analysis.run(arguments):
        _tell_losses(record)


def _passes_of_ablations(run: TrainedRun, steps: list[int] | None) -> int:
    run.require_unit()
    return len(run.choose_steps(steps)) * (2 + len(REPLACEMENTS))  # the fit, h itself, its replacements


def linearity(arguments: Sequence[str]) -> None:
    """Replaces GELUs by lines, and prints the losses and the lines' share at the last step."""
    analysis = OverImages(
        "linearity",
        "Measures how linear the MLPs are, and the loss with a straight line in each GELU's place.",
        lambda run, steps, coverage, _: linearity_of_run(run, steps, coverage),
        lambda run, steps: len(run.choose_steps(steps)) * 3,  # the fit, GELU itself, lines
        draw_linearity,
    )
    for record in analysis.run(arguments):
        _tell_losses(record)
        last = record["steps"][-1]
        by_block = " ".join(f"{share:.1%}" for share in last["explained_by_block"])
        deviations = " ".join(f"{deviation:.3f}" for deviation in last["input_deviation_by_block"])
        console.print(f"  by block: lines explain {by_block} of GELU's variance; deviation of its input {deviations}")


def _tell_losses(record: dict[str, Any]) -> None:
    last = record["steps"][-1]
    own = last["losses"]["own"]
    console.print(f"{record['run']}, step {last['step']:,}: loss {own['loss']:.4f} ± {own['standard_error']:.4f}")
    for name, other in last["losses"].items():
        if name != "own":
            rise, error = other["difference"] / own["loss"], other["difference_error"] / own["loss"]
            console.print(f"  {name}: {other['loss']:.4f} ({rise:+.2%} ± {error:.2%})")
