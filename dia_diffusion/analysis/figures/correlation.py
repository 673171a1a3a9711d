"""The figure of the correlation of attention maps between blocks (Fig. 2)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dia_diffusion.analysis.correlation import BINS, VARIANTS
from dia_diffusion.analysis.figures.common import block_ticks, save
from dia_diffusion.evaluation.curves import COLOURS

TITLES = {"maps": "the maps", "centred": "less channels' means"}
LEGEND = {"maps": "the maps", "centred": "the maps less each channel's mean over images"}
PAPERS_MEAN = 0.85


def draw_correlations(runs: Sequence[dict[str, Any]], path: str | Path) -> None:
    """A row a run and stage of its last step: the maps and the centred ones block by block, and their distributions."""
    rows = [(run, stage) for run in runs for stage in run["steps"][-1]["stages"]]
    figure = Figure(figsize=(12.2, 3.3 * len(rows) + 0.6), layout="constrained")
    grid = figure.subplots(len(rows), 3, squeeze=False, width_ratios=(1, 1, 1.25))
    for (run, stage), axes in zip(rows, grid, strict=True):
        named = f"{run['run']}, {stage['name']}" if stage["name"] else run["run"]
        for variant, heat in zip(VARIANTS, axes[:2], strict=True):
            image = _draw_heat(heat, stage, variant)
        figure.colorbar(image, ax=axes[1], pad=0.02, fraction=0.05)
        axes[0].set_ylabel(named, fontsize="medium")
        _draw_distribution(axes[2], stage)
        axes[2].set_title(f"step {run['steps'][-1]['step']:,}: images, pairs of blocks", fontsize="medium")
    handles = [
        Patch(color=colour, alpha=0.5, label=LEGEND[variant])
        for colour, variant in zip(COLOURS, VARIANTS, strict=False)
    ]
    papers = Line2D([], [], color="0.35", linestyle="--", label=f"{PAPERS_MEAN}: the paper's average for SE, ECA")
    figure.legend(handles=[*handles, papers], loc="outside lower center", ncols=3, frameon=False)
    save(figure, path, dpi=120)


def _draw_heat(axes: Axes, stage: dict[str, Any], variant: str) -> Any:
    matrix = np.array(
        [[np.nan if r is None else r for r in row] for row in stage[variant]["mean_by_pair"]], dtype=float
    )
    np.fill_diagonal(matrix, np.nan)
    axes.set_facecolor("0.9")
    image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    block_ticks(axes, stage["blocks"])
    block_ticks(axes, stage["blocks"], along="y")
    mean = stage[variant]["mean"]
    axes.set_title(f"{TITLES[variant]}: mean {'undefined' if mean is None else f'{mean:.3f}'}", fontsize="medium")
    if len(matrix) <= 9:
        for i, j in zip(*np.nonzero(np.isfinite(matrix)), strict=True):
            colour = "white" if abs(matrix[i, j]) > 0.6 else "black"
            axes.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize="small", color=colour)
    return image


def _draw_distribution(axes: Axes, stage: dict[str, Any]) -> None:
    edges = np.linspace(-1, 1, BINS + 1)
    together = 8  # bins, so that few images draw no comb
    for colour, variant in zip(COLOURS, VARIANTS, strict=False):
        counts = np.array(stage[variant]["histogram"])
        if counts.any():
            density = counts.reshape(-1, together).sum(axis=1) / counts.sum() / (edges[together] - edges[0])
            axes.stairs(density, edges[::together], color=colour, fill=True, alpha=0.35)
            axes.stairs(density, edges[::together], color=colour, linewidth=1)
    undefined = [f"{stage[variant]['undefined']:,}" for variant in VARIANTS]
    if undefined != ["0", "0"]:
        of_all = stage["maps"]["undefined"] + stage["maps"]["coefficients"]
        told = f"undefined of {of_all:,}:\n{undefined[0]}; less means {undefined[1]}"
        axes.text(0.02, 0.97, told, transform=axes.transAxes, va="top", fontsize="small")
    axes.axvline(PAPERS_MEAN, color="0.35", linewidth=1, linestyle="--")
    axes.set_xlim(-1, 1)
    axes.set_yticks([])
    axes.set_xlabel("Pearson's r over channels")
