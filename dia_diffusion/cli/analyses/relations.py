"""`dia-diffusion analyze correlation` and `importance`: what the blocks' attention maps have to do with each other."""

import argparse
from collections.abc import Sequence
from typing import Any

from dia_diffusion.analysis import correlation as correlations
from dia_diffusion.analysis import importance as importances
from dia_diffusion.analysis.figures.correlation import draw_correlations
from dia_diffusion.analysis.figures.importance import draw_importances
from dia_diffusion.analysis.options import Coverage
from dia_diffusion.analysis.trained_run import TrainedRun
from dia_diffusion.cli.analyses.common import OverImages, Record
from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.console import console


def correlation(arguments: Sequence[str]) -> None:
    """Correlates the maps of pairs of blocks, and prints the averages at the last step."""
    analysis = OverImages(
        "correlation",
        "Measures how alike the attention maps of two blocks are, image by image (Fig. 2).",
        lambda run, steps, coverage, _: correlations.correlations_of_run(run, steps, coverage),
        _passes_of_correlation,
        draw_correlations,
    )
    for record in analysis.run(arguments):
        last = record["steps"][-1]
        console.print(f"{record['run']}, step {last['step']:,}: {_of_maps(last['mean'])}")
        for stage in last["stages"]:
            means = {variant: stage[variant]["mean"] for variant in correlations.VARIANTS}
            undefined = stage["maps"]["undefined"]
            constant = f"; {undefined:,} undefined, of maps with one value in all channels" if undefined else ""
            if stage["name"]:
                console.print(f"  {stage['name']}, {len(stage['blocks'])} blocks: {_of_maps(means)}{constant}")
            elif constant:
                console.print(f"  {constant[2:]}")


def _of_maps(means: dict[str, float | None]) -> str:
    maps, centred = ("undefined" if mean is None else f"{mean:.3f}" for mean in means.values())
    return f"mean correlation {maps}; less each channel's mean over images {centred}"


def _passes_of_correlation(run: TrainedRun, steps: list[int] | None) -> int:
    run.require_unit()
    return len(run.with_first(steps)) * correlations.PASSES


def importance(arguments: Sequence[str]) -> None:
    """Fits the forests, and prints how far back the most important block lies at the last step."""
    analysis = OverImages(
        "importance",
        "Measures by random forests which earlier blocks tell a block's attention map (Fig. 11).",
        _importances,
        _passes_of_importance,
        draw_importances,
    )
    for record in analysis.run(arguments, _add_samples, {"--samples": 100}):
        last = record["steps"][-1]
        for stage in last["stages"]:
            named = f", {stage['name']}" if stage["name"] else ""
            console.print(f"{record['run']}{named}, step {last['step']:,}, {stage['samples']:,} samples")
            for variant, title in (("maps", "the maps"), ("centred", "less each channel's mean over images")):
                rows = zip(stage["blocks"][1:], stage[variant], strict=True)
                told = ", ".join(_most(name, row, stage["blocks"], record["least_r2"]) for name, row in rows)
                console.print(f"  {title}: {told}")


def _importances(run: TrainedRun, steps: list[int] | None, coverage: Coverage, options: argparse.Namespace) -> Record:
    return importances.importances_of_run(run, steps, coverage, options.samples)


def _passes_of_importance(run: TrainedRun, steps: list[int] | None) -> int:
    run.require_unit()
    return len(importances.last_step(run, steps)) * importances.PASSES


def _add_samples(parser: CommandParser) -> None:
    parser.add_argument("--samples", type=int, default=20_000, help="to fit each forest on, and as many to score it on")


def _most(name: str, row: dict[str, Any], blocks: Sequence[str], least_r2: float) -> str:
    if row["r2"] is None:
        return f"{name} constant"
    if row["r2"] < least_r2:
        return f"{name} not told (R² {row['r2']:.2f})"
    first = max(range(len(row["importance"])), key=row["importance"].__getitem__)
    return f"{name} by {blocks[first]} {row['importance'][first]:.0%} (R² {row['r2']:.2f})"
