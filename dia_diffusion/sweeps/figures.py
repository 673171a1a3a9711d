"""Figures of sweeps: studies (Fig. 8), accuracies of classifiers, stability (VI-A2), placement (Fig. 10, Table XV)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, TypeVar

import numpy as np

from dia_diffusion.data import read_image
from dia_diffusion.evaluation.curves import floor_level
from dia_diffusion.figures import (
    Axis,
    Figure,
    Level,
    Panel,
    Picture,
    Series,
    Text,
    images_axis,
    log_axis,
    style_of,
    value_axis,
)
from dia_diffusion.io import step_name
from dia_diffusion.plotting import save_figure
from dia_diffusion.sweeps.accuracies import Row
from dia_diffusion.sweeps.collect import Point
from dia_diffusion.sweeps.outcome import NO_BETTER, NOT_FINITE, TRAINED
from dia_diffusion.sweeps.stats import Estimate, comparable, curve_of, estimate
from dia_diffusion.sweeps.sweep import Run, Study
from dia_diffusion.training.run_folder import RunFolder

R = TypeVar("R", bound=Run)

INTERVAL_FROM = 3
"""Fewest seeds for which an interval is drawn: with two it is 13 standard errors wide and hides everything else."""
DODGE = 0.025
"""Distance between units at the same batch size, as a fraction of the axis."""
DODGE_DECADES = 0.07
"""Distance between units at the same learning rate, in decades."""
FAILED = {NOT_FINITE: "×", NO_BETTER: "–"}  # noqa: RUF001


# ---- Studies


def curve_panels(points: Sequence[Point], units: Sequence[str], metric: str, floor: float | None = None) -> list[Panel]:
    """Distance over images seen, a panel per batch size: each unit's mean over seeds with a band, and thin seed curves.

    All panels share the distance axis. It shows every point; a wide band may exceed it.

    Args:
        points: of all batch sizes.
        units: the study's units, in the order of their colors.
        metric: the name of the distance.
        floor: the distance of real images.
    """
    y = value_axis(metric, [point.distance for point in points], [floor])
    panels = []
    for size in sorted({point.batch_size for point in points}):
        seeds, means, counts = [], [], {}
        for style, unit in enumerate(units):
            if (curve := curve_of(points, unit, size)) is None:
                continue
            counts[unit] = len(curve.by_seed)
            own = [point for point in points if (point.unit, point.batch_size) == (unit, size)]
            for seed in sorted({point.seed for point in own}):
                of_seed = [point for point in own if point.seed == seed]
                x = [point.images_seen for point in of_seed]
                seeds.append(Series(x, [p.distance for p in of_seed], style=style, pale=True, markers=False))
            means.append(_means(curve.images_seen, curve.mean, unit, style))
        series, x_axis = [*seeds, *means], images_axis([size])
        panels.append(Panel([*series, *floor_level(floor)], f"batch size {size}", x_axis, y, _seeds(counts)))
    return panels


def final_panel(points: Sequence[Point], units: Sequence[str], metric: str, floor: float | None = None) -> Panel:
    """Final distance against batch size: the mean over seeds with its interval, and a pale marker per seed.

    If there is only one batch size, units are on the x axis instead.

    points: one per run, at the end of its training; for the others see `curve_panels`.
    """
    sizes = sorted({point.batch_size for point in points})
    shown = [unit for unit in units if any(point.unit == unit for point in points)]
    first, last = np.log2(sizes[0]) - 0.5, np.log2(sizes[-1]) + 0.5
    seeds, means = [], []
    for place, unit in enumerate(shown):
        style, own = units.index(unit), [point for point in points if point.unit == unit]
        shift = (place - (len(shown) - 1) / 2) * DODGE * (last - first)
        at = {size: float(place) if len(sizes) == 1 else float(np.log2(size) + shift) for size in sizes}
        groups = {size: [point.distance for point in own if point.batch_size == size] for size in sizes}
        groups = {size: distances for size, distances in groups.items() if distances}
        several = [point for point in own if len(groups[point.batch_size]) > 1]
        x, y = [at[point.batch_size] for point in several], [point.distance for point in several]
        hover = [f"batch size {point.batch_size}, seed {point.seed}" for point in several]
        seeds.append(Series(x, y, unit, style, lines=False, pale=True, hover=hover))
        estimates, hover = [estimate(group) for group in groups.values()], [f"batch size {size}" for size in groups]
        means.append(_means([at[size] for size in groups], estimates, unit, style, bars=True, hover=hover))
    seen = {size: f"{max(p.images_seen for p in points if p.batch_size == size) / 1000:,.4g}k images" for size in sizes}
    if len(sizes) == 1:
        label = f"at batch size {sizes[0]}, {seen[sizes[0]]}"
        x_axis = Axis(label, low=-0.5, high=len(shown) - 0.5, ticks=dict(enumerate(shown)))
    else:
        same = len(set(seen.values())) == 1
        ticks = {float(np.log2(size)): f"{size}" if same else f"{size}\n{seen[size]}" for size in sizes}
        x_axis = Axis(f"batch size, {seen[sizes[0]]} each" if same else "batch size", low=first, high=last, ticks=ticks)
    highs = [high for series in means for high in series.high or ()]
    y_axis = value_axis(f"final {metric}", [point.distance for point in points], [*highs, floor])
    return Panel([*seeds, *means, *floor_level(floor)], x=x_axis, y=y_axis)


def draw_curves_of_study(points: Sequence[Point], units: Sequence[str], path: Path, **how: Any) -> None:
    """Draws `curve_panels`."""
    panels = curve_panels(points, units, **how)
    columns = len(panels) if len(panels) <= 3 else -(-len(panels) // 2)
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    size = (max(6.4, 1 + 3.4 * columns), 0.7 + 3.3 * len(rows))
    save_figure(Figure(rows, size, legend="below", share_y="all"), path)


def draw_final_distances(points: Sequence[Point], units: Sequence[str], path: Path, **how: Any) -> None:
    """Draws `final_panel`."""
    several = len({point.batch_size for point in points}) > 1  # otherwise the axis names the units
    figure = Figure([[final_panel(points, units, **how)]], (6.4, 4.4), legend="below" if several else "none")
    save_figure(figure, path)


def _means(x: Sequence[float], means: Sequence[Estimate], unit: str, style: int, **how: Any) -> Series:
    low, high = (
        [getattr(value, end) if value.count >= INTERVAL_FROM else None for value in means] for end in ("low", "high")
    )
    return Series(x, [value.mean for value in means], unit, style, low=low, high=high, **how)


def _seeds(counts: Mapping[str, int]) -> str:
    """Text such as "5 seeds", or a line per unit if they differ."""
    lines = {unit: f"{count} seed{'' if count == 1 else 's'}" for unit, count in counts.items()}
    if len(set(lines.values())) == 1:
        return next(iter(lines.values()))
    return "\n".join(f"{unit}: {seeds}" for unit, seeds in lines.items())


# ---- Sample grids


def draw_grids(grids: Mapping[str, Path], path: Path) -> None:
    """Draws grids (title -> file) in a row."""
    panels = [Panel([Picture(read_image(grid, str(grid)))], title, frame=False) for title, grid in grids.items()]
    save_figure(Figure([panels], (4 * len(grids), 4.4)), path, dpi=160)


def twins(runs: Sequence[R], batch_size: int, has_grids: Callable[[R], bool]) -> list[R]:
    """One run with grids per unit, all with the same training seed: the first seed that the most units have."""
    by_seed: dict[int, list[R]] = {}
    for run in runs:
        if run.batch_size == batch_size and has_grids(run):
            by_seed.setdefault(run.seed, []).append(run)
    return max(by_seed.values(), key=len, default=[])


def draw_grids_of_study(study: Study) -> list[Path]:
    """Draws, for each batch size, the last grids of its units from the same training seed.

    Returns the files, `grids-bN.png` in the study's folder; batch sizes without grids get none.
    """
    drawn = []
    for batch_size in study.batch_sizes:
        if runs := twins(study.runs, batch_size, lambda run: _last_grid(run).is_file()):
            drawn.append(study.folder / f"grids-b{batch_size}.png")
            draw_grids({run.unit: _last_grid(run) for run in runs}, drawn[-1])
    return drawn


def _last_grid(run: Run) -> Path:
    return RunFolder(run.folder).samples / f"{step_name(run.experiment.train.max_steps)}.png"


# ---- Accuracies


def draw_accuracies(rows: Sequence[Row], path: Path) -> None:
    """Test accuracy over training, a panel per setting: each unit's mean over seeds, with thin seed curves behind it.

    A unit or setting of which all runs diverged has no line or panel.
    """
    settings = list(dict.fromkeys(row.setting for row in rows if row.accuracies)) or [rows[0].setting]
    units = list(dict.fromkeys(row.unit for row in rows))
    panels = []
    for setting in settings:
        series = []
        own = [row for row in rows if row.setting == setting]
        for row in own:
            style = units.index(row.unit)
            curves = [dict(result.curve) for result in row.results if result.accuracy is not None and result.curve]
            shared = comparable(dict(enumerate(curves)))
            for curve in curves if len(curves) > 1 else []:
                series.append(Series(list(curve), list(curve.values()), style=style, pale=True, markers=False))
            if shared:
                means = np.mean([[*curve.values()] for curve in shared.values()], axis=0)
                series.append(Series([*next(iter(shared.values()))], means.tolist(), row.unit, style))
        sizes = {result.recipe["train.batch_size"] for row in own for result in row.results}
        panels.append(Panel(series, fill(setting, 50), images_axis(sizes), Axis("test accuracy", form="percent")))
    save_figure(Figure([panels], (max(6.4, 1 + 4.4 * len(panels)), 4.2), share_y="row"), path)


# ---- Trials


def draw_stability(record: dict[str, Any], path: str | Path) -> None:
    """A panel per variant: held-out loss against learning rate, a line per unit; above it, a sign per diverged seed.

    Each marker is a seed, the line is their mean. A unit's line ends where all its seeds diverged.
    """
    rows, results = record["summary"], record["trials"]
    variants, units = (list(dict.fromkeys(row[key] for row in rows)) for key in ("variant", "unit"))
    rates = [row["learning_rate"] for row in rows]
    x = Axis("learning rate", "log", min(rates) / 1.5, max(rates) * 1.5)
    constant = max((r["constant_loss"] for r in results if r["constant_loss"]), default=None)
    shown = [r["held_out_loss"] for r in results if r["outcome"] == TRAINED]
    label = "held-out loss of those that trained"
    y = Axis(label) if constant is None else log_axis(label, [*shown, constant])
    names = Axis("diverged", low=-0.6, high=len(units) - 0.4, ticks=dict(enumerate(reversed(units))), grid=False)
    counts, losses = [], []
    for variant in variants:
        signs: list[Text] = []
        series: list[Series] = []
        for style, unit in enumerate(units):
            own = [row for row in rows if (row["variant"], row["unit"]) == (variant, unit)]
            for row in own:
                sign = "".join(sorted(FAILED.get(outcome, "") for outcome in row["outcomes"]))
                place = (row["learning_rate"], len(units) - 1 - style)
                signs.append(Text(*place, sign, style_of(style)["color"]))
            shift = 10 ** (DODGE_DECADES * (style - (len(units) - 1) / 2))
            own = [row for row in sorted(own, key=lambda row: row["learning_rate"]) if row["held_out_loss"] is not None]
            at, means = ([row[key] for row in own] for key in ("learning_rate", "held_out_loss"))
            series.append(Series([rate * shift for rate in at], means, unit, style))
            seeds = [r for r in results if (r["trial"]["variant"], r["trial"]["unit"]) == (variant, unit)]
            seeds = [result for result in seeds if result["outcome"] == TRAINED]
            at = [result["trial"]["learning_rate"] * shift for result in seeds]
            each = [result["held_out_loss"] for result in seeds]
            series.append(Series(at, each, style=style, lines=False, pale=True))
        levels = [] if constant is None else [Level(constant, "the best constant")]
        counts.append(Panel(signs, variant, Axis(scale="log", low=x.low, high=x.high, grid=False), names))
        losses.append(Panel([*series, *levels], x=x, y=y))
    signs_mean = "diverged, one sign per seed: " + ", ".join(f"{sign} {outcome}" for outcome, sign in FAILED.items())
    size = (1.8 + 2.8 * max(2, len(variants)), 4.6 + 0.3 * len(units))
    shared: dict[str, Any] = {"share_x": "col", "share_y": "row", "heights": (0.4 * len(units), 3.6)}
    save_figure(Figure([counts, losses], size, legend="below", legend_title=signs_mean, **shared), path)


def draw_placement(record: dict[str, Any], path: str | Path) -> None:
    """Held-out loss, and the distance if measured, for units in the first k blocks and in all but one part.

    Each marker is a seed; lines and error bars are the mean with its 95 % interval.
    """
    rows = record["summary"]
    measures = {"held_out_loss": "held-out loss"}
    if any(row["distance"] for row in rows):
        measures["distance"] = record["protocol"]["metric"]
    firsts = [row for row in rows if row["placement"].startswith("first-")]
    every = max(firsts, key=lambda row: len(row["blocks"]))["placement"]
    names = {"first-0": "no unit", "without-in": "no in", "without-mid": "no mid", "without-out": "no out"}
    grid = []
    for key, label in measures.items():
        first = {len(row["blocks"]): row for row in firsts if row[key]}
        parts = [row for name in (*names, every) for row in rows if row["placement"] == name and row[key]]
        without = dict(enumerate(parts))
        x = Axis(ticks={count: f"{count:g}" for count in first})
        ticks = {place: names.get(row["placement"], "all blocks") for place, row in without.items()}
        panel = Panel(_placements(first, key), x=x, y=Axis(label))
        grid.append([panel, Panel(_placements(without, key, lines=False, bars=True), x=Axis(ticks=ticks))])
    carry = f"blocks, from the first, that carry {record['protocol']['unit']}"
    grid[-1][0] = Panel(grid[-1][0].items, x=Axis(carry, ticks=grid[-1][0].x.ticks), y=grid[-1][0].y)
    size = (8.6, 0.6 + 3.3 * len(measures))
    save_figure(Figure(grid, size, share_y="row", widths=(3, 2)), path)


def _placements(rows: Mapping[int, dict[str, Any]], key: str, **how: Any) -> list[Series]:
    """Series of rows, given by x position: the means with intervals, and each seed."""
    means = [row[f"{key}_mean"] for row in rows.values()]
    halves = [row[f"{key}_half_width"] or 0.0 for row in rows.values()]
    low, high = ([mean + sign * half for mean, half in zip(means, halves, strict=True)] for sign in (-1, 1))
    seeds = [(x, value) for x, row in rows.items() for value in row[key]]
    marks = Series([x for x, _ in seeds], [y for _, y in seeds], color="#000000", lines=False, pale=True)
    return [Series(list(rows), means, style=1, low=low, high=high, **how), marks]
