"""Figures of gradients: how noisy a batch's is, and how large those are that reach each block."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    """A row a step, the first and the last: the distribution of log10 |g| at each block, runs side by side.

    Of networks of several stages the blocks that end them, as in Fig. 13; of one stage all blocks.
    """
    steps = [0, -1] if all(len(run["steps"]) > 1 for run in runs) else [-1]
    widest = max(len(_shown(run["steps"][-1]["blocks"])) for run in runs)
    figure = Figure(
        figsize=(max(7.0, 0.5 + 0.42 * widest * (len(runs) + 1)), 3.5 * len(steps) + 0.4), layout="constrained"
    )
    for place, step in zip(figure.subplots(len(steps), 1, squeeze=False)[:, 0], steps, strict=True):
        for index, run in enumerate(runs):
            blocks = _shown(run["steps"][step]["blocks"])
            offsets = [block + (index - (len(runs) - 1) / 2) / (len(runs) + 0.6) for block in range(len(blocks))]
            for offset, block in zip(offsets, blocks, strict=True):
                _draw_violin(place, offset, block, 0.42 / (len(runs) + 0.6), COLOURS[index % len(COLOURS)])
            colour = COLOURS[index % len(COLOURS)]
            place.plot(
                [], [], color=colour, linewidth=6, alpha=0.5, label=f"{run['run']}, step {run['steps'][step]['step']:,}"
            )
        names = [
            block["stage"] or block["block"]
            for block in max((_shown(run["steps"][step]["blocks"]) for run in runs), key=len)
        ]
        place.set_xticks(range(len(names)), names)
        place.set_xlabel("output of the stage" if runs[0]["steps"][-1]["blocks"][0]["stage"] else "output of the block")
        place.set_ylabel(r"$\log_{10}$ |gradient|")
        place.grid(alpha=0.25, linewidth=0.6, axis="y")
        place.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path, dpi=130)


def _shown(blocks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    several = len({block["stage"] for block in blocks}) > 1
    return [block for block in blocks if block["ends_stage"] or not several]


def _draw_violin(axes: Axes, place: float, block: dict[str, Any], width: float, colour: str) -> None:
    """The histogram to both sides, with a line from the 5 % to the 95 % quantile and a dot at the median."""
    histogram, together = block["histogram"], 10
    counts = np.array(histogram["counts"])
    if not len(counts):
        return
    counts = np.pad(counts, (0, -len(counts) % together)).reshape(-1, together).sum(axis=1)
    centres = histogram["lowest"] + (np.arange(len(counts)) + 0.5) * together / histogram["bins_a_decade"]
    sides = width * counts / counts.max()
    axes.fill_betweenx(centres, place - sides, place + sides, color=colour, alpha=0.45, linewidth=0)
    low, middle, high = (np.log10(block["quantiles"][q] or np.nan) for q in ("0.05", "0.5", "0.95"))
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
