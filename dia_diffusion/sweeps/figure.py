"""A study's figures: distance over training, a panel a batch size, and final distance against batch size (Fig. 8)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from dia_diffusion.evaluation.curves import draw_floor, draw_line, save_figure, scale_distances, scale_images, style
from dia_diffusion.sweeps.collect import Point
from dia_diffusion.sweeps.stats import Estimate, curve_of, estimate

INTERVAL_FROM = 3
"""The seeds from which an interval is drawn: that of two is 13 standard errors wide and hides all else."""
DODGE = 0.025
"""How far apart units stand at one batch size, as a part of the axis."""


def draw_curves_of_study(
    points: Sequence[Point], units: Sequence[str], path: Path, *, metric: str, floor: float | None = None
) -> None:
    """Distance over images seen: a panel a batch size, a line a unit, the mean over seeds with its band.

    Each seed's own curve is drawn thin. The distance's axis is the same in all panels and has room for every point; a
    wide band may leave it.

    units: the study's, in the order that colours go by.
    """
    sizes = sorted({point.batch_size for point in points})
    columns = len(sizes) if len(sizes) <= 3 else -(-len(sizes) // 2)
    lines = -(-len(sizes) // columns)
    figure = Figure(figsize=(max(6.4, 1 + 3.4 * columns), 0.7 + 3.3 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for axes in panels[len(sizes) :]:
        axes.remove()
    for axes, size in zip(panels, sizes, strict=False):
        _draw_panel(axes, [point for point in points if point.batch_size == size], units, size)
        if floor is not None:
            draw_floor(axes, floor)
        scale_images(axes, {size})
        for images_or_steps in (axes, *axes.child_axes):
            images_or_steps.xaxis.set_major_locator(MaxNLocator(5))
        _scale(axes, [point.distance for point in points], floor)
    for row in grid:
        row[0].set_ylabel(metric)
    _draw_legend(figure, panels[: len(sizes)])
    save_figure(figure, path)


def draw_final_distances(
    points: Sequence[Point], units: Sequence[str], path: Path, *, metric: str, floor: float | None = None
) -> None:
    """Final distance against batch size: the mean over seeds with its interval, each seed a pale mark.

    Where there is one batch size only, units stand side by side instead.

    points: one a run, of the end of its training.
    units: as above.
    """
    sizes = sorted({point.batch_size for point in points})
    shown = [unit for unit in units if any(point.unit == unit for point in points)]
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    first, last = np.log2(sizes[0]) - 0.5, np.log2(sizes[-1]) + 0.5
    highest = []
    for place, unit in enumerate(shown):
        groups = {size: [p.distance for p in points if (p.unit, p.batch_size) == (unit, size)] for size in sizes}
        groups = {size: distances for size, distances in groups.items() if distances}
        shift = (place - (len(shown) - 1) / 2) * DODGE * (last - first)
        places = [float(place)] if len(sizes) == 1 else [np.log2(size) + shift for size in groups]
        highest += _draw_unit(axes, places, list(groups.values()), units.index(unit), unit)
    if floor is not None:
        draw_floor(axes, floor)
    _scale(axes, [*(point.distance for point in points), *highest], floor)
    if len(sizes) == 1:
        axes.set_xticks(range(len(shown)), shown, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_xlabel(f"at batch size {sizes[0]}, {_images(points, sizes[0])}")
        axes.margins(x=0.1)
    else:
        images = [_images(points, size) for size in sizes]
        same = len(set(images)) == 1
        axes.set_xticks(
            np.log2(sizes), [f"{size}" if same else f"{size}\n{seen}" for size, seen in zip(sizes, images, strict=True)]
        )
        axes.set_xlim(first, last)
        axes.set_xlabel(f"batch size, {images[0]} each" if same else "batch size")
        _draw_legend(figure, [axes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylabel(f"final {metric}")
    save_figure(figure, path)


def _draw_panel(axes: Axes, points: Sequence[Point], units: Sequence[str], size: int) -> None:
    counts = {}
    for index, unit in enumerate(units):
        if (curve := curve_of(points, unit, size)) is None:
            continue
        counts[unit] = len(curve.by_seed)
        own = [point for point in points if point.unit == unit]
        for seed in {point.seed for point in own}:
            x, y = zip(*((point.images_seen, point.distance) for point in own if point.seed == seed), strict=True)
            axes.plot(x, y, **{**style(index), "marker": ""}, linewidth=0.7, alpha=0.35)
        mean = curve.mean
        low, high = ([drawn_end(value, end) for value in mean] for end in (-1, 1))
        draw_line(axes, curve.images_seen, [value.mean for value in mean], index, unit, low, high)
    axes.set_title(f"batch size {size}")
    axes.text(0.97, 0.96, _seeds(counts), transform=axes.transAxes, ha="right", va="top", fontsize="small")


def _draw_unit(
    axes: Axes, places: Sequence[float], groups: Sequence[Sequence[float]], index: int, unit: str
) -> list[float]:
    """One unit's means with their intervals, a group of seeds each, and the upper ends of what was drawn."""
    means = [estimate(group) for group in groups]
    for x, group in zip(places, groups, strict=True):
        if len(group) > 1:
            axes.plot([x] * len(group), group, **{**style(index), "linestyle": ""}, markersize=3, alpha=0.35)
    highs = [drawn_end(value, 1) for value in means]
    centres = [value.mean for value in means]
    for x, value, high in zip(places, means, highs, strict=True):
        if high is not None:
            axes.errorbar(x, value.mean, high - value.mean, color=style(index)["color"], elinewidth=1.2, capsize=3)
    axes.plot(places, centres, **style(index), markersize=5, linewidth=1.4, label=unit)
    return [high for high in highs if high is not None]


def drawn_end(value: Estimate, end: int) -> float | None:
    """The lower (-1) or upper (1) end of an interval, where it is drawn."""
    return None if value.count < INTERVAL_FROM or value.half_width is None else value.mean + end * value.half_width


def _scale(axes: Axes, distances: Sequence[float], floor: float | None) -> None:
    """Room for these distances and the floor, whatever else is drawn."""
    scale_distances(axes, distances)
    shown = [*distances, *([] if floor is None else [floor])]
    if axes.get_yscale() == "log" and min(shown) > 0:
        room = (max(shown) / min(shown)) ** 0.05
        axes.set_ylim(min(shown) / room, max(shown) * room)
    else:
        axes.set_ylim(0, 1.08 * max(shown))


INCHES_PER_ENTRY = 2.4  # such as "dia-lstm-light-identity" with its marker


def _draw_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One for all panels, below them; the floor, dashed in each, comes after the units."""
    entries = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    entries = dict(sorted(entries.items(), key=lambda entry: entry[0].startswith("floor")))
    fitting = max(1, int(figure.get_figwidth() // INCHES_PER_ENTRY))
    columns = min(len(entries), fitting, 4)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False)


def _seeds(counts: Mapping[str, int]) -> str:
    """As "5 seeds", or a line a unit where they differ."""
    told = {unit: f"{count} seed{'' if count == 1 else 's'}" for unit, count in counts.items()}
    if len(set(told.values())) == 1:
        return next(iter(told.values()))
    return "\n".join(f"{unit}: {seeds}" for unit, seeds in told.items())


def _images(points: Sequence[Point], size: int) -> str:
    """How many images the runs of a batch size have seen, as "192k images"."""
    return f"{max(point.images_seen for point in points if point.batch_size == size) / 1000:,.4g}k images"
