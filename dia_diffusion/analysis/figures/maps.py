"""The figure of attention maps over depth, training, times and classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dia_diffusion.analysis.attention_maps import RANGE
from dia_diffusion.analysis.figures.common import block_ticks, save
from dia_diffusion.analysis.map_moments import SOURCES
from dia_diffusion.evaluation.curves import COLOURS

LABELS = {"blocks": "between blocks", "channels": "channels", "times": "times", "images": "images"}
MOST_CLASSES = 12  # a panel's


def draw_maps(runs: Sequence[dict[str, Any]], path: str | Path) -> None:
    """A column a run: h over depth for each step, where its variance lies over training, h over time and by class."""
    rows = ["depth", "shares"]
    rows += ["times"] * any(run["has_times"] for run in runs)
    rows += ["classes"] * any("classes" in run["steps"][-1] for run in runs)
    figure = Figure(figsize=(4.4 * len(runs) + 0.6, 3.1 * len(rows) + 0.3), layout="constrained")
    grid = figure.subplots(len(rows), len(runs), squeeze=False)
    draws = {"depth": _draw_depth, "shares": _draw_shares, "times": _draw_times, "classes": _draw_classes}
    for column, run in enumerate(runs):
        grid[0, column].set_title(run["run"])
        for name, axes in zip(rows, grid[:, column], strict=True):
            draws[name](axes, run)
    _same_heights(grid[0], bottom=min(0, min(min(step["low_by_block"]) for run in runs for step in run["steps"])))
    if "times" in rows:
        _same_heights([axes for axes, run in zip(grid[2], runs, strict=True) if run["has_times"]])
    handles, labels = grid[1, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(SOURCES) if len(runs) > 1 else 2, frameon=False
    )
    save(figure, path, dpi=120)


def _same_heights(axes: Sequence[Axes], bottom: float | None = None) -> None:
    low = min(each.get_ylim()[0] for each in axes) if bottom is None else bottom
    high = max(each.get_ylim()[1] for each in axes)
    for each in axes:
        each.set_ylim(low, high)


def _draw_depth(axes: Axes, run: dict[str, Any]) -> None:
    colours = matplotlib.colormaps["viridis_r"]
    steps = run["steps"]
    last = len(steps) - 1
    for index, step in enumerate(steps):
        blocks = range(len(step["mean_by_block"]))
        colour = colours(0.1 + 0.9 * index / max(last, 1))
        if index in (0, last):
            axes.fill_between(blocks, step["low_by_block"], step["high_by_block"], color=colour, alpha=0.2, linewidth=0)
        label = f"step {step['step']:,}" if index in (0, last) else None
        axes.plot(blocks, step["mean_by_block"], color=colour, linewidth=1.6, marker="o", markersize=3, label=label)
    _name_blocks(axes, run)
    axes.set_ylabel("attention map h")
    axes.set_xlabel(f"block (band: {RANGE[0]}-{RANGE[1]} % of channels)")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize="small")


def _draw_shares(axes: Axes, run: dict[str, Any]) -> None:
    steps = run["steps"]
    below = [0.0] * len(steps)
    for colour, source in zip(COLOURS, SOURCES, strict=False):
        heights = [step["shares"][source] for step in steps]
        axes.bar(range(len(steps)), heights, bottom=below, color=colour, label=LABELS[source], width=0.85)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    every = max(1, len(steps) // 4)
    shown = list(range(0, len(steps), every))
    axes.set_xticks(shown, [f"{steps[index]['step']:,}" for index in shown])
    axes.set_xlabel("step")
    axes.set_ylabel("share of the variance of h")
    axes.set_ylim(0, 1)


def _draw_times(axes: Axes, run: dict[str, Any]) -> None:
    if not run["has_times"]:
        axes.set_axis_off()
        return
    colours = matplotlib.colormaps["plasma"]
    step = run["steps"][-1]
    blocks = step["mean_by_block_and_time"]
    names = _names(run)
    count = len(blocks[0])
    times = [(index + 0.5) / count for index in range(count)]
    labelled = {0, len(blocks) - 1} if len(blocks) > 14 else set(range(len(blocks)))
    for index, means in enumerate(blocks):
        colour = colours(0.9 * index / max(len(blocks) - 1, 1))
        axes.plot(times, means, color=colour, linewidth=1.6, label=names[index] if index in labelled else None)
    axes.set_ylabel("attention map h")
    axes.set_xlabel(f"time (0: image, 1: noise), step {step['step']:,}")
    axes.set_xlim(0, 1)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize="small", ncols=1 + len(labelled) // 7)


def _draw_classes(axes: Axes, run: dict[str, Any]) -> None:
    """How far each class's mean h lies from that of all images, a block; classes by number of images if many."""
    classes = run["steps"][-1].get("classes")
    if classes is None:
        axes.set_axis_off()
        return
    shown = sorted(sorted(range(len(classes["names"])), key=lambda c: -classes["counts"][c])[:MOST_CLASSES])
    values = 1000 * np.array(classes["deviation_by_class_and_block"])[shown]
    largest = float(np.abs(values).max()) or 1.0
    image = axes.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(shown)), [classes["names"][c] for c in shown], fontsize="small")
    _name_blocks(axes, run)
    adjusted = classes["adjusted"]
    told = "" if adjusted is None else f"\n(adjusted for chance {adjusted:.1%})"
    axes.set_title(f"classes explain {classes['share']:.1%} of the variance over images{told}", fontsize="small")
    axes.set_xlabel("block")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, fraction=0.06)
    bar.set_label("class's mean h less that of all, $10^{-3}$", fontsize="small")


def _names(run: dict[str, Any]) -> list[str]:
    return [block for stage in run["stages"] for block in stage["blocks"]]


def _name_blocks(axes: Axes, run: dict[str, Any]) -> None:
    """The blocks' names along the lower axis, and a line between stages."""
    block_ticks(axes, _names(run))
    ends = np.cumsum([len(stage["blocks"]) for stage in run["stages"]])[:-1]
    for end in ends:
        axes.axvline(end - 0.5, color="0.5", linewidth=0.8, linestyle=":")
