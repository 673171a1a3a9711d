"""Figures of gradients: how noisy a batch's is, and how large those are that reach each block."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dia_diffusion.analysis.figures.common import over_training, save, style
from dia_diffusion.analysis.gradient_noise import GROUPS
from dia_diffusion.evaluation.curves import COLOURS


def draw_noise(runs: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Noise scale over training, by group at the end, and the gradient norms that training logged."""
    figure = Figure(figsize=(10.4, 7.6), layout="constrained")
    (scale, by_group), (norms, variation) = figure.subplots(2, 2)
    for index, run in enumerate(runs):
        line = {**style(index), "label": run["run"]}
        seen = [step["images_seen"] for step in run["steps"]]
        _draw_scales(scale, seen, [step["groups"]["all"] for step in run["steps"]], line)
        logged = run["logged"]
        seen = [window["last_step"] * run["batch_size"] for window in logged]
        norms.plot(seen, [window["mean"] for window in logged], **line)
        variation.plot(seen, [window["variation"] for window in logged], **line)
        groups = run["steps"][-1]["groups"]
        places = [place + 0.16 * (index - (len(runs) - 1) / 2) for place, name in enumerate(GROUPS) if name in groups]
        measured = [groups[name] for name in GROUPS if name in groups]
        _draw_scales(by_group, places, measured, {**line, "linestyle": "none"})
    for place, title in (
        (scale, "noise scale tr Σ / |G|², images (↑: at least)"),
        (norms, "gradient norm of a batch, as logged"),
        (variation, "its deviation over its mean"),
    ):
        place.set_title(title)
        over_training(place)
    norms.set_ylim(bottom=0)
    variation.set_ylim(bottom=0)
    by_group.set_title("noise scale by group, last step")
    by_group.set_xticks(range(len(GROUPS)), GROUPS)
    by_group.grid(alpha=0.25, linewidth=0.6, axis="y")
    handles, labels = norms.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(runs)), frameon=False)
    save(figure, path)


def draw_magnitudes(runs: Sequence[dict[str, Any]], path: str | Path) -> None:
    """The distribution of log10 |g| at each block, runs side by side, for the first step in common and each one's last.

    Of networks of several stages the blocks that end them, as in Fig. 13; of one stage all blocks.
    """
    rows = [0, -1] if all(len(run["steps"]) > 1 for run in runs) else [-1]
    blocks = max((_shown(run["steps"][-1]["blocks"]) for run in runs), key=len)
    width = max(7.0, 1.0 + 0.42 * len(blocks) * (len(runs) + 1))
    figure = Figure(figsize=(width, 3.5 * len(rows) + 0.6), layout="constrained")
    for axes, row in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        for index, run in enumerate(runs):
            _draw_violins(axes, _shown(run["steps"][row]["blocks"]), index, len(runs))
        axes.set_xticks(range(len(blocks)), [block["stage"] or block["block"] for block in blocks])
        axes.set_xlabel("output of the " + ("stage" if blocks[0]["stage"] else "block"))
        axes.set_ylabel(r"$\log_{10}$ |gradient|")
        axes.grid(alpha=0.25, linewidth=0.6, axis="y")
        steps = sorted({run["steps"][row]["step"] for run in runs})
        axes.set_title(f"step {', '.join(f'{step:,}' for step in steps)} (line: 5-95 %, dot: median)")
    handles = [
        Patch(color=COLOURS[index % len(COLOURS)], alpha=0.5, label=run["run"]) for index, run in enumerate(runs)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(runs)), frameon=False)
    save(figure, path, dpi=130)


def _draw_violins(axes: Axes, blocks: Sequence[dict[str, Any]], index: int, runs: int) -> None:
    """A run's blocks, its place among so many runs; with nearly all elements in view."""
    width = 1 / (runs + 0.6)
    for place, block in enumerate(blocks):
        if block["quantiles"] is not None:
            offset = (index - (runs - 1) / 2) * width
            _draw_violin(axes, place + offset, block, 0.42 * width, COLOURS[index % len(COLOURS)])
            lowest = np.log10(block["quantiles"]["0.05"]) - 1.5
            bottom = axes.get_ylim()[0] if place + index else lowest
            axes.set_ylim(bottom=min(bottom, lowest))


def _shown(blocks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    several = len({block["stage"] for block in blocks}) > 1
    return [block for block in blocks if block["ends_stage"] or not several]


def _draw_violin(axes: Axes, place: float, block: dict[str, Any], width: float, colour: str) -> None:
    """The histogram to both sides, with a line from the 5 % to the 95 % quantile and a dot at the median."""
    histogram, together = block["histogram"], 2
    counts = np.array(histogram["counts"])
    if not len(counts):
        return
    counts = np.pad(counts, (0, -len(counts) % together)).reshape(-1, together).sum(axis=1)
    centres = histogram["lowest"] + (np.arange(len(counts)) + 0.5) * together / histogram["bins_a_decade"]
    sides = width * counts / counts.max()
    axes.fill_betweenx(centres, place - sides, place + sides, color=colour, alpha=0.45, linewidth=0)
    low, middle, high = (np.log10(block["quantiles"][q]) for q in ("0.05", "0.5", "0.95"))
    axes.vlines(place, low, high, color=colour, linewidth=1.2)
    axes.plot(place, middle, "o", color=colour, markersize=4)


def _draw_scales(axes: Axes, places: Sequence[float], noises: Sequence[dict[str, Any]], line: dict[str, Any]) -> None:
    """Noise scales with their ranges; where the range has no upper end, a caret at its lower one."""
    known = [(place, noise) for place, noise in zip(places, noises, strict=True) if noise["noise_scale_high"]]
    axes.plot([place for place, _ in known], [noise["noise_scale"] for _, noise in known], **line)
    for place, noise in known:
        axes.vlines(place, noise["noise_scale_low"], noise["noise_scale_high"], color=line["color"], linewidth=1)
    at_least = [(place, noise["noise_scale_low"]) for place, noise in zip(places, noises, strict=True)]
    at_least = [pair for pair, noise in zip(at_least, noises, strict=True) if not noise["noise_scale_high"] and pair[1]]
    if known or at_least:
        axes.set_yscale("log")
    if at_least:
        axes.plot(*zip(*at_least, strict=True), color=line["color"], marker="$\u2191$", markersize=9, linestyle="none")
