"""The figures of stability (VI-A2) and placement (Fig. 10 and Table XV), drawn from their records alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from dia_diffusion.evaluation.curves import save_figure, style
from dia_diffusion.sweeps.trials import NO_BETTER, NOT_FINITE, TRAINED

FAILED = {NOT_FINITE: "×", NO_BETTER: "–"}  # noqa: RUF001
DODGE = 0.07
"""How far apart units stand at one learning rate, in decades."""


def draw_stability(record: dict[str, Any], path: str | Path) -> None:
    """A panel a variant: held-out loss against learning rate, a line a unit; above, a sign for each seed that diverged.

    A mark is a seed, the line their mean. A unit's line ends where all of its seeds have diverged.
    """
    rows, results = record["summary"], record["trials"]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    units, rates = list(dict.fromkeys(row["unit"] for row in rows)), [row["learning_rate"] for row in rows]
    figure = Figure(figsize=(1.8 + 2.8 * max(2, len(variants)), 4.6 + 0.3 * len(units)), layout="constrained")
    grid = figure.subplots(
        2, len(variants), sharex=True, sharey="row", squeeze=False, height_ratios=(0.4 * len(units), 3.6)
    )
    for column, variant in enumerate(variants):
        counts, losses = grid[:, column]
        counts.set_title(variant)
        for index, unit in enumerate(units):
            own = [row for row in rows if (row["variant"], row["unit"]) == (variant, unit)]
            _draw_counts(counts, own, len(units) - 1 - index, style(index)["color"])
            seeds = [r for r in results if (r["trial"]["variant"], r["trial"]["unit"]) == (variant, unit)]
            _draw_rates(losses, own, seeds, index, 10 ** (DODGE * (index - (len(units) - 1) / 2)))
        counts.set_ylim(-0.6, len(units) - 0.4)
        counts.set_yticks(range(len(units)), reversed(units), fontsize="small")
        counts.tick_params(axis="x", which="both", length=0)
        losses.set_xscale("log")
        losses.set_xlim(min(rates) / 1.5, max(rates) * 1.5)
        losses.set_xlabel("learning rate")
    constant = max((r["constant_loss"] for r in results if r["constant_loss"]), default=None)
    for losses in grid[1] if constant is not None else ():  # else there is nothing to show on a logarithmic axis
        losses.set_yscale("log")
        losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        losses.yaxis.set_major_formatter(ScalarFormatter())
        losses.yaxis.set_minor_formatter(NullFormatter())
        losses.grid(alpha=0.25, linewidth=0.6)
        losses.axhline(constant, color="0.35", linestyle="--", linewidth=1.2, label="the best constant")
    grid[0, 0].set_ylabel("diverged")
    grid[1, 0].set_ylabel("held-out loss of those that trained")
    handles, labels = grid[1, 0].get_legend_handles_labels()
    told = "diverged, a sign a seed: " + ", ".join(f"{sign} {outcome}" for outcome, sign in FAILED.items())
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, title=told, title_fontsize="medium"
    )
    save_figure(figure, path)


def _draw_counts(axes: Axes, rows: Sequence[dict[str, Any]], height: int, colour: str) -> None:
    for row in rows:
        signs = "".join(sorted(FAILED.get(outcome, "") for outcome in row["outcomes"]))
        axes.text(row["learning_rate"], height, signs, color=colour, weight="bold", ha="center", va="center")


def _draw_rates(
    axes: Axes, rows: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], index: int, shift: float
) -> None:
    look = style(index)
    trained = [row for row in sorted(rows, key=lambda row: row["learning_rate"]) if row["held_out_loss"] is not None]
    axes.plot(
        [row["learning_rate"] * shift for row in trained],
        [row["held_out_loss"] for row in trained],
        **look,
        markersize=4,
        linewidth=1.3,
        label=rows[0]["unit"],
    )
    each = [result for result in results if result["outcome"] == TRAINED]
    axes.plot(
        [result["trial"]["learning_rate"] * shift for result in each],
        [result["held_out_loss"] for result in each],
        **{**look, "linestyle": ""},
        markersize=2.5,
        alpha=0.4,
    )


def draw_placement(record: dict[str, Any], path: str | Path) -> None:
    """Held-out loss, and the distance where measured, against the number of first blocks, and without each part.

    A mark is a seed; lines and bars are their mean with its 95 % interval.
    """
    rows = record["summary"]
    measures = [("held_out_loss", "held-out loss")]
    if any(row["distance"] for row in rows):
        measures.append(("distance", record["protocol"]["metric"]))
    figure = Figure(figsize=(8.6, 0.6 + 3.3 * len(measures)), layout="constrained")
    grid = figure.subplots(len(measures), 2, sharey="row", squeeze=False, width_ratios=(3, 2))
    for (first, without), (key, label) in zip(grid, measures, strict=True):
        _draw_first(first, [row for row in rows if row["placement"].startswith("first-")], key)
        _draw_without(without, rows, key)
        first.set_ylabel(label)
        for axes in (first, without):
            axes.grid(alpha=0.25, linewidth=0.6, axis="y")
    grid[-1, 0].set_xlabel(f"blocks, from the first, that carry {record['protocol']['unit']}")
    save_figure(figure, path)


def _draw_first(axes: Axes, rows: Sequence[dict[str, Any]], key: str) -> None:
    rows = [row for row in rows if row[key]]
    counts, look = [len(row["blocks"]) for row in rows], style(1)
    means = [row[f"{key}_mean"] for row in rows]
    halves = [row[f"{key}_half_width"] or 0.0 for row in rows]
    low = [mean - half for mean, half in zip(means, halves, strict=True)]
    high = [mean + half for mean, half in zip(means, halves, strict=True)]
    axes.fill_between(counts, low, high, color=look["color"], alpha=0.18, linewidth=0)
    axes.plot(counts, means, **{**look, "linestyle": "-"}, markersize=4, linewidth=1.5)
    for count, row in zip(counts, rows, strict=True):
        _draw_seeds(axes, count, row[key])
    axes.set_xticks(counts)


def _draw_without(axes: Axes, rows: Sequence[dict[str, Any]], key: str) -> None:
    by_name = {row["placement"]: row for row in rows if row[key]}
    full = max((row for row in rows if row["placement"].startswith("first-")), key=lambda row: len(row["blocks"]))
    names = {"first-0": "no unit", "without-in": "no in", "without-mid": "no mid", "without-out": "no out"}
    shown = [name for name in (*names, full["placement"]) if name in by_name]
    for place, name in enumerate(shown):
        row = by_name[name]
        half = row[f"{key}_half_width"] or 0.0
        look = {"color": style(1)["color"], "marker": "o", "markersize": 5, "capsize": 3}
        axes.errorbar(place, row[f"{key}_mean"], half, linestyle="", **look)
        _draw_seeds(axes, place, row[key])
    axes.set_xticks(range(len(shown)), [names.get(name, "all blocks") for name in shown], fontsize="small")
    axes.margins(x=0.12)


def _draw_seeds(axes: Axes, place: float, values: Sequence[float]) -> None:
    axes.plot([place] * len(values), values, linestyle="", marker=".", color="0.25", markersize=4, alpha=0.6)
