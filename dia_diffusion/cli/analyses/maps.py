"""`dia-diffusion analyze maps`."""

from collections.abc import Sequence

from dia_diffusion.analysis.attention_maps import maps_of_run
from dia_diffusion.analysis.figures.maps import draw_maps
from dia_diffusion.analysis.trained_run import TrainedRun
from dia_diffusion.cli.analyses.common import OverImages
from dia_diffusion.cli.console import console


def maps(arguments: Sequence[str]) -> None:
    """Measures h, and prints what its variance at the last step is made of."""
    description = "Measures the attention map over depth, times, classes, images and training."
    analysis = OverImages(
        "maps", description, lambda run, steps, coverage, _: maps_of_run(run, steps, coverage), _passes, draw_maps
    )
    for record in analysis.run(arguments):
        last = record["steps"][-1]
        shares = ", ".join(f"{name} {share:.1%}" for name, share in last["shares"].items())
        by_block = " ".join(f"{mean:.3f}" for mean in last["mean_by_block"])
        console.print(f"{record['run']}, step {last['step']:,}: h by block {by_block}; variance: {shares}")
        if classes := last.get("classes"):
            adjusted = "" if classes["adjusted"] is None else f", adjusted {classes['adjusted']:.1%}"
            told = f"{classes['share']:.1%} (by chance {classes['share_by_chance']:.1%}{adjusted})"
            console.print(f"  of the variance over images {len(classes['names'])} classes explain {told}")


def _passes(run: TrainedRun, steps: list[int] | None) -> int:
    run.require_unit()
    return len(run.with_first(steps))
