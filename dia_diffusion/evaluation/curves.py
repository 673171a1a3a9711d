"""Distance against images seen, one line a run (the form of the paper's Fig. 8)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.record import EvaluationRecord
from dia_diffusion.files import whole_file

# Okabe and Ito's colours, which the colour-blind can tell apart; the markers do where there is no colour at all.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LOG_FROM = 10
"""The ratio of largest to smallest distance from which the distance's axis is logarithmic."""

Run = tuple[str, Sequence[EvaluationRecord]]
Point = dict[str, Any]


def draw_curves(
    runs: Sequence[Run], path: str | Path, *, floor: float | None = None, title: str | None = None
) -> list[Point]:
    """Draws one line a (label, records) into a figure file, its format by its suffix, and returns the points drawn.

    `floor` is the distance a perfect model would reach. A point has label, unit, batch_size, seed, step, images_seen,
    distance, low and high; these are its interval over images, a band where all points of a line have one. Of two
    records of one step the later counts. Where batch sizes agree, steps get an axis too.
    Raises InputError when a run has nothing to draw, for an unknown format, and naming what differs when protocols are
    mixed.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    file_format, formats = Path(path).suffix.removeprefix("."), figure.canvas.get_supported_filetypes()
    if file_format not in formats:
        raise InputError(f"{path} names no known format of figures; its ending may be one of: {', '.join(formats)}")
    if not runs:
        raise InputError("no runs to draw")
    refuse_mixed_protocols(runs)
    lines = [_points(label, records) for label, records in runs]
    points = [point for line in lines for point in line]
    axes = figure.add_subplot()
    for index, line in enumerate(lines):
        images_seen, color = [point["images_seen"] for point in line], COLOURS[index % len(COLOURS)]
        if all(point["low"] is not None for point in line):
            low, high = ([point[end] for point in line] for end in ("low", "high"))
            axes.fill_between(images_seen, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(
            images_seen,
            [point["distance"] for point in line],
            color=color,
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            linewidth=1.6,
            label=line[0]["label"],
        )
    if floor is not None:
        axes.axhline(floor, color="0.35", linestyle="--", linewidth=1.2, label=f"floor: real images, {floor:.3g}")
    _scale_distances(axes, [point["distance"] for point in points])
    _scale_images(axes, {point["batch_size"] for point in points})
    record = runs[0][1][0]
    axes.set_ylabel(f"{record.metric}, {record.protocol.num_samples:,} samples")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False)
    if title:
        axes.set_title(title)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format=file_format, dpi=200)
    return points


def refuse_mixed_protocols(runs: Sequence[Run]) -> None:
    """Raises InputError that names the first two points whose protocols differ, and in what."""
    placed = [(label, record) for label, records in runs for record in records]
    for label, record in placed[1:]:
        first_label, first = placed[0]
        if differences := first.protocol.differences(record.protocol):
            told = ", ".join(f"{name} {mine} against {other}" for name, (mine, other) in differences.items())
            raise InputError(
                f"{first_label} (step {first.step}) and {label} (step {record.step}) can't share a figure, their "
                f"protocols differ: {told}"
            )


def _points(label: str, records: Sequence[EvaluationRecord]) -> list[Point]:
    by_images = {record.images_seen: record for record in records}
    if not by_images or None in by_images:
        raise InputError(f"{label} has no evaluations of known training progress to draw")
    fields = ("unit", "batch_size", "seed", "step", "images_seen", "distance", "low", "high")
    ordered = sorted(by_images.values(), key=lambda record: record.images_seen or 0)
    return [{"label": label} | {name: getattr(record, name) for name in fields} for record in ordered]


def _scale_distances(axes: Axes, distances: Sequence[float]) -> None:
    """Logarithmic for a wide range, else linear from zero, so that a small difference looks small."""
    if min(distances) > 0 and max(distances) / min(distances) >= LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)


def _scale_images(axes: Axes, batch_sizes: set[int | None]) -> None:
    axes.set_xlim(left=0)
    axes.set_xlabel("images seen")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(batch_sizes) == 1 and (batch_size := batch_sizes.pop()):
        to_steps, to_images = partial(np.multiply, 1 / batch_size), partial(np.multiply, batch_size)
        steps = axes.secondary_xaxis("top", functions=(to_steps, to_images))
        steps.set_xlabel(f"steps of {batch_size} images")
        steps.xaxis.set_major_formatter(EngFormatter(sep=""))
