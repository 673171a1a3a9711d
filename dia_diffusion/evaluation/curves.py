"""Distance against images seen, one line per run (the form of the paper's Fig. 8)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.record import EvaluationRecord
from dia_diffusion.figures import Figure, Level, Panel, Series, images_axis, value_axis
from dia_diffusion.plotting import check_format, save_figure

Run = tuple[str, Sequence[EvaluationRecord]]
Point = dict[str, Any]


def draw_curves(
    runs: Sequence[Run], path: str | Path, *, floor: float | None = None, title: str | None = None
) -> list[Point]:
    """Draws one line per (label, records) into a file, its format named by its suffix, and returns the points.

    A point has label, unit, batch_size, seed, step, images_seen, distance, low and high.

    Args:
        runs: if a step has two records, the later one counts.
        path: of the figure.
        floor: the distance that a perfect model would reach.
        title: above the figure.

    Raises:
        InputError: a run has nothing to draw, the format is unknown, or protocols differ.
    """
    check_format(path)
    if not runs:
        raise InputError("no runs to draw")
    refuse_mixed_protocols(runs)
    lines = [points_of(label, records) for label, records in runs]
    panel = curve_panel(lines, distance_label(runs[0][1][0]), floor=floor, title=title or "")
    save_figure(Figure([[panel]]), path)
    return [point for line in lines for point in line]


def draw_widths(widths: Sequence[float], records: Sequence[EvaluationRecord], path: str | Path) -> list[Point]:
    """Draws distance against the relative width of an average, and returns the points in order of width."""
    by_width = dict(sorted(zip(widths, records, strict=True), key=lambda pair: pair[0]))
    points = [
        {"width": w, **{key: getattr(r, key) for key in ("distance", "low", "high")}} for w, r in by_width.items()
    ]
    y, low, high = ([point[key] for point in points] for key in ("distance", "low", "high"))
    x_axis = value_axis("relative width of the average", by_width)
    y_axis = value_axis(distance_label(records[0]), y, [*low, *high])
    panel = Panel([Series(list(by_width), y, low=low, high=high)], x=x_axis, y=y_axis)
    save_figure(Figure([[panel]], legend="none"), path)
    return points


def curve_panel(lines: Sequence[Sequence[Point]], metric: str, *, floor: float | None = None, title: str = "") -> Panel:
    """One line per list of points, with their intervals, and an axis of steps if batch sizes agree."""
    series, points = [], [point for line in lines for point in line]
    for style, line in enumerate(lines):
        x, y, low, high = ([point[key] for point in line] for key in ("images_seen", "distance", "low", "high"))
        series.append(Series(x, y, line[0]["label"], style, low=low, high=high))
    ends = [point[end] for point in points for end in ("low", "high")]
    y_axis = value_axis(metric, [point["distance"] for point in points], [*ends, floor])
    x_axis = images_axis(point["batch_size"] for point in points)
    return Panel([*series, *floor_level(floor)], title, x_axis, y_axis)


def floor_level(floor: float | None) -> list[Level]:
    """The distance that a perfect model would reach, if it is known."""
    return [] if floor is None else [Level(floor, f"floor: real images, {floor:.3g}")]


def refuse_mixed_protocols(runs: Sequence[Run]) -> None:
    """Raises InputError that names the first two points with different protocols, and the differences."""
    placed = [(label, record) for label, records in runs for record in records]
    for label, record in placed[1:]:
        first_label, first = placed[0]
        if differences := first.protocol.differences(record.protocol):
            listed = ", ".join(f"{name} {mine} vs. {other}" for name, (mine, other) in differences.items())
            raise InputError(
                f"{first_label} (step {first.step}) and {label} (step {record.step}) can't be plotted together "
                f"because their protocols differ: {listed}"
            )


def points_of(label: str, records: Sequence[EvaluationRecord]) -> list[Point]:
    """The points of a run in order of images seen.

    Raises:
        InputError: there are no records, or one doesn't say how far training had come.
    """
    by_images = {record.images_seen: record for record in records}
    if not by_images or None in by_images:
        raise InputError(f"{label} has no evaluations of known training progress to draw")
    fields = ("unit", "batch_size", "seed", "step", "images_seen", "distance", "low", "high")
    ordered = sorted(by_images.values(), key=lambda record: record.images_seen or 0)
    return [{"label": label} | {name: getattr(record, name) for name in fields} for record in ordered]


def distance_label(record: EvaluationRecord) -> str:
    """A label for a record's distance, such as "FID, 10,000 samples"."""
    return f"{record.metric}, {record.protocol.num_samples:,} samples"
