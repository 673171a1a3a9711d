"""Figures of losses with a part of the network replaced."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dia_diffusion.analysis.figures.common import over_training, percent, save, style


def draw_ablations(runs: Sequence[dict[str, Any]], path: str | Path) -> None:
    """A column a run: the loss with h and with each replacement over training, and how much higher that is."""
    figure = Figure(figsize=(4.4 * len(runs) + 0.6, 7.4), layout="constrained")
    axes = figure.subplots(2, len(runs), squeeze=False, sharey="row")
    for column, run in enumerate(runs):
        loss, rise = axes[:, column]
        loss.set_title(run["run"])
        names = list(run["steps"][-1]["losses"])
        for index, name in enumerate(names):
            line = {**style(index), "label": "h itself" if name == "own" else name}
            _draw_losses(loss, run["steps"], name, line)
            if name != "own":
                _draw_rise(rise, run["steps"], name, line)
    for place in axes.flat:
        over_training(place)
    axes[0, 0].set_ylabel("loss")
    axes[0, 0].set_ylim(bottom=0)  # shared, so only once all columns are drawn
    axes[1, 0].set_ylabel("higher than with h itself, % (bars: 2 s.e.)")
    for place in axes[1]:
        percent(place)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if len(runs) == 1 else 5, frameon=False)
    save(figure, path)


def draw_linearity(runs: Sequence[dict[str, Any]], path: str | Path) -> None:
    """What a line explains of GELU, by block at the end and over training; its input; the loss with lines."""
    figure = Figure(figsize=(10.4, 7.6), layout="constrained")
    (by_block, deviation), (explained, rise) = figure.subplots(2, 2)
    for index, run in enumerate(runs):
        line = {**style(index), "label": run["run"]}
        last = run["steps"][-1]
        blocks = range(1, len(last["explained_by_block"]) + 1)
        by_block.plot(blocks, last["explained_by_block"], **line)
        deviation.plot(blocks, last["input_deviation_by_block"], **line)
        seen = [step["images_seen"] for step in run["steps"]]
        explained.plot(seen, [step["explained"] for step in run["steps"]], **line)
        _draw_rise(rise, run["steps"], "lines for GELU", line)
    by_block.set_title("share of GELU's variance that lines explain, last step")
    deviation.set_title("deviation of GELU's input, last step")
    explained.set_title("the share in all blocks together")
    rise.set_title("loss with lines for GELU: % higher (bars: 2 s.e.)")
    for place in (by_block, deviation):
        place.set_xlabel("block")
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
        place.grid(alpha=0.25, linewidth=0.6)
    for place in (explained, rise):
        over_training(place)
    for place in (by_block, explained):
        place.set_ylim(0, 1.02)
    deviation.set_ylim(bottom=0)
    percent(rise)
    handles, labels = by_block.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(runs)), frameon=False)
    save(figure, path)


def _draw_losses(axes: Axes, steps: Sequence[dict[str, Any]], name: str, line: dict[str, Any]) -> None:
    axes.plot([step["images_seen"] for step in steps], [step["losses"][name]["loss"] for step in steps], **line)


def _draw_rise(axes: Axes, steps: Sequence[dict[str, Any]], name: str, line: dict[str, Any]) -> None:
    """How much higher than its own the loss is with a replacement, in per cent, with two standard errors."""
    seen = [step["images_seen"] for step in steps]
    own = [step["losses"]["own"]["loss"] for step in steps]
    rises, errors = (
        [100 * step["losses"][name][key] / loss for step, loss in zip(steps, own, strict=True)]
        for key in ("difference", "difference_error")
    )
    axes.errorbar(seen, rises, yerr=[2 * error for error in errors], **line)
