"""The figure of which earlier blocks tell a block's attention map (Fig. 11)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dia_diffusion.analysis.figures.common import block_ticks, save
from dia_diffusion.analysis.importance import VARIANTS

TITLES = {"maps": "the maps", "centred": "less each channel's mean over images"}


def draw_importances(runs: Sequence[dict[str, Any]], path: str | Path) -> None:
    """A row a run and stage of its last step; rows of a triangle whose forest predicts nothing are hatched."""
    rows = [(run, stage) for run in runs for stage in run["steps"][-1]["stages"] if len(stage["blocks"]) > 1]
    figure = Figure(figsize=(11.2, 3.5 * max(1, len(rows)) + 0.3), layout="constrained")
    grid = figure.subplots(max(1, len(rows)), 2, squeeze=False)
    for (run, stage), axes in zip(rows, grid, strict=False):
        for variant, triangle in zip(VARIANTS, axes, strict=True):
            image = _draw_triangle(triangle, stage["blocks"], stage[variant], run["least_r2"])
            triangle.set_title(TITLES[variant], fontsize="medium")
        figure.colorbar(image, ax=axes[1], pad=0.16, fraction=0.05, label="Gini importance")
        named = f"{run['run']}, {stage['name']}" if stage["name"] else run["run"]
        axes[0].set_ylabel(f"{named}, step {run['steps'][-1]['step']:,}\nblock whose map is told")
    if not rows:
        grid[0, 0].set_title("no stage has two blocks")
    save(figure, path, dpi=120)


def _draw_triangle(axes: Axes, blocks: Sequence[str], rows: Sequence[dict[str, Any]], least_r2: float) -> Any:
    count = len(blocks) - 1
    matrix = np.full((count, count), np.nan)
    for index, row in enumerate(rows):
        matrix[index, : index + 1] = row["importance"]
    image = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    for index, row in enumerate(rows):
        believed = row["r2"] is not None and row["r2"] >= least_r2
        if not believed:
            hatched: dict[str, Any] = {"facecolor": "0.85", "edgecolor": "0.55", "hatch": "////", "linewidth": 0}
            axes.add_patch(Rectangle((-0.5, index - 0.5), index + 1, 1, **hatched))
        told = "constant" if row["r2"] is None else f"$R^2$ {row['r2']:.2f}"
        axes.text(count - 0.4, index, told, va="center", fontsize="small", color="black" if believed else "0.5")
        for place, value in enumerate(row["importance"] if believed and count <= 8 else []):
            colour = "black" if value > 0.6 else "white"
            axes.text(place, index, f"{value:.2f}", ha="center", va="center", fontsize="small", color=colour)
    block_ticks(axes, blocks[:-1])
    block_ticks(axes, blocks[1:], along="y")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel(f"earlier block (hatched: held-out $R^2$ below {least_r2:g})")
    return image
