"""What a suite found: tables of numbers, on the screen, as JSON and as a figure."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from interleave import Timing
from rich.console import Console
from rich.table import Table

from dia_diffusion.io import write_json

matplotlib.use("agg")
import matplotlib.pyplot as plt

console = Console(highlight=False, width=140)


@dataclass
class Found:
    """A table: what was timed against what.

    figures: rows of plain numbers or text, all with the same keys.
    timings: the raw seconds behind them.
    """

    title: str
    figures: list[dict[str, Any]]
    timings: list[Timing] = field(default_factory=list)
    note: str = ""


def rows_of(timings: list[Timing], base: Timing, peak: float | None = None) -> list[dict[str, Any]]:
    """A row a timing; times and their ratios to the base's, round by round."""
    rows = []
    for timing in timings:
        ratio, low, high = timing.ratio_to(base)
        row: dict[str, Any] = {
            "what": timing.name,
            "seconds": timing.median,
            "images/s": timing.images_per_second,
            f"time / {base.name}'s": f"{ratio:.3f} [{low:.3f}, {high:.3f}]",
        }
        if peak is not None and timing.flops is not None:
            row["TFLOP"] = timing.flops / 1e12
            row["% of peak"] = 100 * timing.flops / timing.median / peak
        rows.append(row)
    return rows


def show(found: Found) -> None:
    """The table on the screen."""
    table = Table(title=found.title, title_justify="left", caption=found.note or None, caption_justify="left")
    for column in found.figures[0]:
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in found.figures:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


def save(tables: list[Found], about: dict[str, Any], path: Path) -> None:
    """PATH.json, with every second that was measured, and PATH.png."""
    write_json(path.with_suffix(".json"), {**about, "tables": [asdict(found) for found in tables]})
    timed = [found for found in tables if found.timings]
    if not timed:
        return
    figure, axes = plt.subplots(
        len(timed), 1, figsize=(9, sum(0.9 + 0.4 * len(found.timings) for found in timed)), squeeze=False,
        gridspec_kw={"height_ratios": [1 + len(found.timings) for found in timed]}, layout="constrained",
    )  # fmt: skip
    for found, axis in zip(timed, axes[:, 0], strict=True):
        names = [timing.name for timing in found.timings]
        medians = [timing.median for timing in found.timings]
        axis.barh(names, medians, color="#4878a8", height=0.6)
        for place, timing in enumerate(found.timings):
            axis.plot(timing.seconds, [place] * len(timing.seconds), "k|", markersize=9)
        axis.invert_yaxis()
        axis.set_title(found.title, fontsize=9, loc="left")
        axis.set_xlabel("seconds a run: median, and each round", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)
