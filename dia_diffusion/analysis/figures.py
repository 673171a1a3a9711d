"""The analyses' figures, drawn from the records alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from dia_diffusion.analysis.attention_maps import RANGE, SOURCES
from dia_diffusion.analysis.gradient_noise import GROUPS
from dia_diffusion.evaluation.curves import COLOURS, MARKERS
from dia_diffusion.files import whole_file

LABELS = {"blocks": "between blocks", "channels": "channels", "times": "times", "images": "images"}


def draw_maps(runs: Sequence[dict[str, Any]], path: str | Path) -> None:
    """A column a run: h over depth for each step, where its variance lies over training, h over time at the end."""
    figure = Figure(figsize=(4.4 * len(runs) + 0.6, 9.6), layout="constrained")
    axes = figure.subplots(3, len(runs), squeeze=False, sharey="row")
    for column, run in enumerate(runs):
        depth, shares, times = axes[:, column]
        depth.set_title(run["run"])
        _draw_depth(depth, run["steps"])
        _draw_shares(shares, run["steps"])
        _draw_times(times, run["steps"][-1])
    lowest = min(min(step["low_by_block"]) for run in runs for step in run["steps"])
    axes[0, 0].set_ylim(bottom=min(0, lowest))  # shared, so only once all columns are drawn
    axes[0, 0].set_ylabel("attention map h")
    axes[1, 0].set_ylabel("share of the variance of h")
    axes[2, 0].set_ylabel("attention map h")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(SOURCES), frameon=False)
    _save(figure, path)


def draw_ablations(runs: Sequence[dict[str, Any]], path: str | Path) -> None:
    """A column a run: the loss with h and with each replacement over training, and how much higher that is."""
    figure = Figure(figsize=(4.4 * len(runs) + 0.6, 7.4), layout="constrained")
    axes = figure.subplots(2, len(runs), squeeze=False, sharey="row")
    for column, run in enumerate(runs):
        loss, rise = axes[:, column]
        loss.set_title(run["run"])
        names = list(run["steps"][-1]["losses"])
        for index, name in enumerate(names):
            style = {**_style(index), "label": "h itself" if name == "own" else name}
            _draw_losses(loss, run["steps"], name, style)
            if name != "own":
                _draw_rise(rise, run["steps"], name, style)
    for place in axes.flat:
        _over_training(place)
    axes[0, 0].set_ylabel("loss")
    axes[0, 0].set_ylim(bottom=0)  # shared, so only once all columns are drawn
    axes[1, 0].set_ylabel("higher than with h itself, % (bars: 2 s.e.)")
    for place in axes[1]:
        _percent(place)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if len(runs) == 1 else 5, frameon=False)
    _save(figure, path)


def draw_linearity(runs: Sequence[dict[str, Any]], path: str | Path) -> None:
    """What a line explains of GELU, by block at the end and over training; its input; the loss with lines."""
    figure = Figure(figsize=(10.4, 7.6), layout="constrained")
    (by_block, deviation), (explained, rise) = figure.subplots(2, 2)
    for index, run in enumerate(runs):
        style = {**_style(index), "label": run["run"]}
        last = run["steps"][-1]
        blocks = range(1, len(last["explained_by_block"]) + 1)
        by_block.plot(blocks, last["explained_by_block"], **style)
        deviation.plot(blocks, last["input_deviation_by_block"], **style)
        seen = [step["images_seen"] for step in run["steps"]]
        explained.plot(seen, [step["explained"] for step in run["steps"]], **style)
        _draw_rise(rise, run["steps"], "lines for GELU", style)
    by_block.set_title("share of GELU's variance that lines explain, last step")
    deviation.set_title("deviation of GELU's input, last step")
    explained.set_title("the share in all blocks together")
    rise.set_title("loss with lines for GELU: % higher (bars: 2 s.e.)")
    for place in (by_block, deviation):
        place.set_xlabel("block")
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
        place.grid(alpha=0.25, linewidth=0.6)
    for place in (explained, rise):
        _over_training(place)
    for place in (by_block, explained):
        place.set_ylim(0, 1.02)
    deviation.set_ylim(bottom=0)
    _percent(rise)
    handles, labels = by_block.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(runs)), frameon=False)
    _save(figure, path)


def draw_noise(runs: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Noise scale over training, by group at the end, and the gradient norms that training logged."""
    figure = Figure(figsize=(10.4, 7.6), layout="constrained")
    (scale, by_group), (norms, variation) = figure.subplots(2, 2)
    for index, run in enumerate(runs):
        style = {**_style(index), "label": run["run"]}
        seen = [step["images_seen"] for step in run["steps"]]
        _draw_scales(scale, seen, [step["groups"]["all"] for step in run["steps"]], style)
        logged = run["logged"]
        seen = [window["last_step"] * run["batch_size"] for window in logged]
        norms.plot(seen, [window["mean"] for window in logged], **style)
        variation.plot(seen, [window["variation"] for window in logged], **style)
        groups = run["steps"][-1]["groups"]
        places = [place + 0.16 * (index - (len(runs) - 1) / 2) for place, name in enumerate(GROUPS) if name in groups]
        measured = [groups[name] for name in GROUPS if name in groups]
        _draw_scales(by_group, places, measured, {**style, "linestyle": "none"})
    for place, title in (
        (scale, "noise scale tr Σ / |G|², images (↑: at least)"),
        (norms, "gradient norm of a batch, as logged"),
        (variation, "its deviation over its mean"),
    ):
        place.set_title(title)
        _over_training(place)
    norms.set_ylim(bottom=0)
    variation.set_ylim(bottom=0)
    by_group.set_title("noise scale by group, last step")
    by_group.set_xticks(range(len(GROUPS)), GROUPS)
    by_group.grid(alpha=0.25, linewidth=0.6, axis="y")
    handles, labels = norms.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(runs)), frameon=False)
    _save(figure, path)


def _draw_depth(axes: Axes, steps: Sequence[dict[str, Any]]) -> None:
    colours = matplotlib.colormaps["viridis_r"]
    last = len(steps) - 1
    for index, step in enumerate(steps):
        blocks = range(1, len(step["mean_by_block"]) + 1)
        colour = colours(0.1 + 0.9 * index / max(last, 1))
        if index in (0, last):
            axes.fill_between(blocks, step["low_by_block"], step["high_by_block"], color=colour, alpha=0.2, linewidth=0)
        label = f"step {step['step']:,}" if index in (0, last) else None
        axes.plot(blocks, step["mean_by_block"], color=colour, linewidth=1.6, marker="o", markersize=3, label=label)
    axes.set_xticks(blocks)
    axes.set_xlabel(f"block (band: {RANGE[0]}-{RANGE[1]} % of channels)")
    axes.tick_params(labelleft=True)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize="small")


def _draw_shares(axes: Axes, steps: Sequence[dict[str, Any]]) -> None:
    below = [0.0] * len(steps)
    for colour, source in zip(COLOURS, SOURCES, strict=False):
        heights = [step["shares"][source] for step in steps]
        axes.bar(range(len(steps)), heights, bottom=below, color=colour, label=LABELS[source], width=0.85)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    every = max(1, len(steps) // 4)
    shown = list(range(0, len(steps), every))
    axes.set_xticks(shown, [f"{steps[index]['step']:,}" for index in shown])
    axes.set_xlabel("step")
    axes.set_ylim(0, 1)


def _draw_times(axes: Axes, step: dict[str, Any]) -> None:
    colours = matplotlib.colormaps["plasma"]
    blocks = step["mean_by_block_and_time"]
    count = len(blocks[0])
    times = [(index + 0.5) / count for index in range(count)]
    for index, means in enumerate(blocks):
        colour = colours(0.9 * index / max(len(blocks) - 1, 1))
        axes.plot(times, means, color=colour, linewidth=1.6, label=f"block {index + 1}")
    axes.set_xlabel(f"time (0: image, 1: noise), step {step['step']:,}")
    axes.set_xlim(0, 1)
    axes.tick_params(labelleft=True)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize="small", ncols=1 + len(blocks) // 7)


def _draw_scales(axes: Axes, places: Sequence[float], noises: Sequence[dict[str, Any]], style: dict[str, Any]) -> None:
    """Noise scales with their ranges; where the range has no upper end, a caret at its lower one."""
    known = [(place, noise) for place, noise in zip(places, noises, strict=True) if noise["noise_scale_high"]]
    axes.plot([place for place, _ in known], [noise["noise_scale"] for _, noise in known], **style)
    for place, noise in known:
        axes.vlines(place, noise["noise_scale_low"], noise["noise_scale_high"], color=style["color"], linewidth=1)
    at_least = [(place, noise["noise_scale_low"]) for place, noise in zip(places, noises, strict=True)]
    at_least = [pair for pair, noise in zip(at_least, noises, strict=True) if not noise["noise_scale_high"] and pair[1]]
    if known or at_least:
        axes.set_yscale("log")
    if at_least:
        axes.plot(*zip(*at_least, strict=True), color=style["color"], marker="$\u2191$", markersize=9, linestyle="none")


def _draw_losses(axes: Axes, steps: Sequence[dict[str, Any]], name: str, style: dict[str, Any]) -> None:
    axes.plot([step["images_seen"] for step in steps], [step["losses"][name]["loss"] for step in steps], **style)


def _draw_rise(axes: Axes, steps: Sequence[dict[str, Any]], name: str, style: dict[str, Any]) -> None:
    """How much higher than its own the loss is with a replacement, in per cent, with two standard errors."""
    seen = [step["images_seen"] for step in steps]
    own = [step["losses"]["own"]["loss"] for step in steps]
    rises, errors = (
        [100 * step["losses"][name][key] / loss for step, loss in zip(steps, own, strict=True)]
        for key in ("difference", "difference_error")
    )
    axes.errorbar(seen, rises, yerr=[2 * error for error in errors], **style)


def _percent(axes: Axes) -> None:
    """Per cent from below 1 to above 100: linear up to 1, logarithmic from there."""
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=min(0, axes.dataLim.y0))
    axes.yaxis.set_major_formatter("{x:g}")


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4,
        "linewidth": 1.6,
    }


def _over_training(axes: Axes) -> None:
    axes.set_xlabel("images seen")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(labelleft=True)
    axes.grid(alpha=0.25, linewidth=0.6)


def _save(figure: Figure, path: str | Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)
