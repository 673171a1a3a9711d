"""Distance against images seen, one line a run (the form of the paper's Fig. 8)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.record import EvaluationRecord
from dia_diffusion.io import atomic_file

# Okabe and Ito's colours, which the colour-blind can tell apart; the markers do where there is no colour at all.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":")
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
    check_format(path)
    if not runs:
        raise InputError("no runs to draw")
    refuse_mixed_protocols(runs)
    lines = [_points(label, records) for label, records in runs]
    points = [point for line in lines for point in line]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for index, line in enumerate(lines):
        images_seen, distances, low, high = (
            [point[name] for point in line] for name in ("images_seen", "distance", "low", "high")
        )
        draw_line(axes, images_seen, distances, index, line[0]["label"], low, high)
    if floor is not None:
        draw_floor(axes, floor)
    scale_distances(axes, [point["distance"] for point in points])
    scale_images(axes, {point["batch_size"] for point in points})
    axes.set_ylabel(distance_label(runs[0][1][0]))
    axes.legend(frameon=False)
    if title:
        axes.set_title(title)
    save_figure(figure, path)
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


def style(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line of this index, which no other of the first 21 has."""
    turn = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[(index + turn) % len(MARKERS)],
        "linestyle": DASHES[turn % len(DASHES)],
    }


def draw_line(
    axes: Axes,
    images_seen: Sequence[float],
    distances: Sequence[float],
    index: int,
    label: str,
    low: Sequence[float | None],
    high: Sequence[float | None],
) -> None:
    """One line in its style, with a band from `low` to `high` where all points have both."""
    if None not in low and None not in high:
        axes.fill_between(images_seen, low, high, color=style(index)["color"], alpha=0.2, linewidth=0)  # type: ignore[arg-type]
    axes.plot(images_seen, distances, **style(index), markersize=4, linewidth=1.6, label=label)


def draw_floor(axes: Axes, floor: float) -> None:
    """The distance a perfect model would reach, and that in the legend."""
    axes.axhline(floor, color="0.35", linestyle="--", linewidth=1.2, label=f"floor: real images, {floor:.3g}")


def distance_label(record: EvaluationRecord) -> str:
    """What a record's distance is, as "FID, 10,000 samples"."""
    return f"{record.metric}, {record.protocol.num_samples:,} samples"


def check_format(path: str | Path) -> str:
    """The format that a figure's file is named for. Raises InputError where there is none."""
    file_format, formats = Path(path).suffix.removeprefix("."), FigureCanvasBase.get_supported_filetypes()
    if file_format not in formats:
        raise InputError(f"{path} names no known format of figures; its ending may be one of: {', '.join(formats)}")
    return file_format


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a whole figure in the format of its name."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=check_format(path), dpi=200)


def scale_distances(axes: Axes, distances: Sequence[float]) -> None:
    """Logarithmic for a wide range, else linear from zero, so that a small difference looks small."""
    if min(distances) > 0 and max(distances) / min(distances) >= LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25, linewidth=0.6)


def scale_images(axes: Axes, batch_sizes: set[int | None]) -> None:
    """Images seen from zero, and steps on a second axis where one batch size makes them that."""
    axes.set_xlim(left=0)
    axes.set_xlabel("images seen")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(batch_sizes) == 1 and (batch_size := batch_sizes.pop()):
        to_steps, to_images = partial(np.multiply, 1 / batch_size), partial(np.multiply, batch_size)
        steps = axes.secondary_xaxis("top", functions=(to_steps, to_images))
        steps.set_xlabel(f"steps of {batch_size} images")
        steps.xaxis.set_major_formatter(EngFormatter(sep=""))
