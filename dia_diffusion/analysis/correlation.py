"""How alike the attention maps of two blocks are (Fig. 2): Pearson's coefficient over channels, image by image.

For an image x and blocks i < j of one stage (the same channels) with maps h_i(x), h_j(x) in R^N:

    r_ij(x) = corr_n(h_i(x)_n, h_j(x)_n)

The paper finds averages above 0.85 for SE and ECA. That alone doesn't say whether the maps attend to the image alike:
two constant vectors that have the same large and small channels correlate as much. So the same coefficient is taken
of the maps less each channel's mean over images (at the same time), beside it: what is left of the likeness once the
channels' own levels are gone. A vector with the same value in all channels has no correlation; those are counted.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import nn

from dia_diffusion.analysis.analysis import Analysis, Record
from dia_diffusion.analysis.attention_maps import Values, map_stream, measure_maps
from dia_diffusion.analysis.drawing import block_ticks, save
from dia_diffusion.analysis.run import Coverage, TrainedRun
from dia_diffusion.analysis.stages import attended_stages
from dia_diffusion.evaluation.curves import COLOURS

VARIANTS = ("maps", "centred")
BINS = 400  # of the coefficients' histogram, over -1..1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CONSTANT = 1e-6  # deviation over channels, of the map's root mean square, below which a float32 map is constant


def pearson(h: Values, scale: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The coefficients (B, L, L) over channels of the maps (L, B, N) of each pair of blocks; NaN where one is constant.

    scale: the size (L, B) of the numbers that h was computed from, which its rounding errors go by.
    """
    apart = h - h.mean(axis=2, keepdims=True)
    norm = np.sqrt(np.square(apart).mean(axis=2))  # (L, B)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = np.where(norm > CONSTANT * scale, 1.0, np.nan)[..., None] * apart / norm[..., None]
    return np.clip(np.einsum("ibn,jbn->bij", unit, unit) / h.shape[2], -1, 1)


class Coefficients:
    """The distribution over images of the coefficients of each pair of a stage's L blocks; flat in memory."""

    def __init__(self, num_blocks: int):
        self.pairs = np.triu_indices(num_blocks, 1)
        self.num_blocks = num_blocks
        self.sums, self.counts = np.zeros(len(self.pairs[0])), np.zeros(len(self.pairs[0]), dtype=np.int64)
        self.undefined = 0
        self.histogram = np.zeros(BINS, dtype=np.int64)

    def add(self, coefficients: npt.NDArray[np.float64]) -> None:
        """More of them (B, L, L)."""
        of_pairs = coefficients[:, *self.pairs]  # (B, P)
        known = np.isfinite(of_pairs)
        self.sums += np.where(known, of_pairs, 0).sum(axis=0)
        self.counts += known.sum(axis=0)
        self.undefined += int((~known).sum())
        self.histogram += np.histogram(of_pairs[known], bins=BINS, range=(-1, 1))[0]

    def summary(self) -> dict[str, Any]:
        """For a record; quantiles are good to a bin, 2 / BINS. A mean of nothing is None."""
        by_pair = [float(s / c) if c else None for s, c in zip(self.sums, self.counts, strict=True)]
        known = [mean for mean in by_pair if mean is not None]
        matrix: list[list[float | None]] = [[None] * self.num_blocks for _ in range(self.num_blocks)]
        for i, j, mean in zip(*self.pairs, by_pair, strict=True):
            matrix[i][j] = matrix[j][i] = mean
        return {
            "mean": float(np.mean(known)) if known else None,
            "mean_by_pair": matrix,
            "quantiles": self._quantiles(),
            "coefficients": int(self.counts.sum()),
            "undefined": self.undefined,
            "histogram": self.histogram.tolist(),
        }

    def _quantiles(self) -> dict[str, float] | None:
        below = np.concatenate([[0], np.cumsum(self.histogram)]) / max(1, self.histogram.sum())
        if not self.histogram.any():
            return None
        edges = np.linspace(-1, 1, BINS + 1)
        return {str(q): float(np.interp(q, below, edges)) for q in QUANTILES}


def _measure(run: TrainedRun, model: nn.Module, coverage: Coverage) -> Record:
    """A record per stage with a unit: its blocks, and the coefficients of its maps as they are and centered."""
    stages = attended_stages(model)
    moments = measure_maps(run, model, coverage)
    found = [{variant: Coefficients(len(stage.attended)) for variant in VARIANTS} for stage in stages]
    for batch, maps in map_stream(run, model, coverage):
        for h, whole, coefficients in zip(maps, moments, found, strict=True):
            scale = np.sqrt(np.square(h).mean(axis=2))
            coefficients["maps"].add(pearson(h, scale))
            coefficients["centred"].add(pearson(whole.center(h, batch.time), scale))
    records: list[Record] = [
        {
            "name": stage.name,
            "blocks": stage.attended_blocks,
            "channels": stage.channels,
            **{variant: coefficients[variant].summary() for variant in VARIANTS},
        }
        for stage, coefficients in zip(stages, found, strict=True)
    ]
    means = {variant: _mean_of_pairs([record[variant]["mean_by_pair"] for record in records]) for variant in VARIANTS}
    return {"mean": means, "stages": records}


def _mean_of_pairs(matrices: Sequence[Sequence[Sequence[float | None]]]) -> float | None:
    """Each pair counts alike; both halves of a matrix are the same pairs, its diagonal is None."""
    known = [value for matrix in matrices for row in matrix for value in row if value is not None]
    return float(np.mean(known)) if known else None


def describe(record: Record) -> Iterator[str]:
    """The mean correlations at the last step, and of each stage."""
    last = record["steps"][-1]
    yield f"{record['run']}, step {last['step']:,}: {_in_words(last['mean'])}"
    for stage in last["stages"]:
        undefined = stage["maps"]["undefined"]
        constant = f"{undefined:,} undefined, of maps with one value in all channels" if undefined else ""
        if stage["name"]:
            means = _in_words({variant: stage[variant]["mean"] for variant in VARIANTS})
            yield f"  {stage['name']}, {len(stage['blocks'])} blocks: {'; '.join(filter(None, (means, constant)))}"
        elif constant:
            yield f"  {constant}"


def _in_words(means: dict[str, float | None]) -> str:
    maps, centered = ("undefined" if mean is None else f"{mean:.3f}" for mean in means.values())
    return f"mean correlation {maps}; less each channel's mean over images {centered}"


# ---- figure

TITLES = {"maps": "the maps", "centred": "less channels' means"}
LEGEND = {"maps": "the maps", "centred": "the maps less each channel's mean over images"}
PAPERS_MEAN = 0.85


def draw(runs: Sequence[dict[str, Any]], path: str | Path) -> None:
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


ANALYSIS = Analysis(_measure, draw, describe, passes=2)  # the means, then the coefficients
