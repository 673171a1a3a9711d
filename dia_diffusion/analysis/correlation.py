"""How similar the attention maps of two blocks are (Fig. 2): Pearson's coefficient over channels, for each image.

For an image x and blocks i < j of one stage (the same channels) with maps h_i(x), h_j(x) in R^N:

    r_ij(x) = corr_n(h_i(x)_n, h_j(x)_n)

The paper finds averages above 0.85 for SE and ECA. That alone doesn't show that two blocks attend to the image in the
same way: two constant vectors with the same large and small channels correlate just as strongly. So the coefficient is
also computed after subtracting each channel's mean over images at the same time ("centred"), which removes the
channels' levels. A map with the same value in all channels has no correlation; such maps are counted.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from dia_diffusion.analysis.analysis import Analysis, Record, quantiles
from dia_diffusion.analysis.attention_maps import Values, map_stream, measure_maps
from dia_diffusion.analysis.run import Coverage, TrainedRun
from dia_diffusion.analysis.stages import attended_stages
from dia_diffusion.figures import Area, Axis, Figure, HeatMap, Item, Level, Panel, block_axis

VARIANTS = ("maps", "centred")
BINS = 400  # of the coefficients' histogram, over -1..1
CONSTANT = 1e-6  # a float32 map with a smaller deviation over channels, relative to its root mean square, is constant


def pearson(h: Values, scale: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The coefficients (B, L, L) over channels of maps (L, B, N), for each pair of blocks; NaN if one is constant.

    scale: the magnitude (L, B) of the numbers that h was computed from, which sets its rounding error.
    """
    apart = h - h.mean(axis=2, keepdims=True)
    norm = np.sqrt(np.square(apart).mean(axis=2))  # (L, B)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = np.where(norm > CONSTANT * scale, 1.0, np.nan)[..., None] * apart / norm[..., None]
    return np.clip(np.einsum("ibn,jbn->bij", unit, unit) / h.shape[2], -1, 1)


class Coefficients:
    """The distribution over images of the coefficients of each pair of a stage's L blocks, in constant memory."""

    def __init__(self, num_blocks: int):
        self.pairs = np.triu_indices(num_blocks, 1)
        self.num_blocks = num_blocks
        self.sums, self.counts = np.zeros(len(self.pairs[0])), np.zeros(len(self.pairs[0]), dtype=np.int64)
        self.undefined = 0
        self.histogram = np.zeros(BINS, dtype=np.int64)

    def add(self, coefficients: npt.NDArray[np.float64]) -> None:
        """Adds coefficients (B, L, L)."""
        of_pairs = coefficients[:, *self.pairs]  # (B, P)
        known = np.isfinite(of_pairs)
        self.sums += np.where(known, of_pairs, 0).sum(axis=0)
        self.counts += known.sum(axis=0)
        self.undefined += int((~known).sum())
        self.histogram += np.histogram(of_pairs[known], bins=BINS, range=(-1, 1))[0]

    def summary(self) -> dict[str, Any]:
        """For a record; quantiles are accurate to one bin, 2 / BINS. A mean of no values is None."""
        by_pair = [float(s / c) if c else None for s, c in zip(self.sums, self.counts, strict=True)]
        known = [mean for mean in by_pair if mean is not None]
        matrix: list[list[float | None]] = [[None] * self.num_blocks for _ in range(self.num_blocks)]
        for i, j, mean in zip(*self.pairs, by_pair, strict=True):
            matrix[i][j] = matrix[j][i] = mean
        return {
            "mean": float(np.mean(known)) if known else None,
            "mean_by_pair": matrix,
            "quantiles": quantiles(self.histogram, -1, 1),
            "coefficients": int(self.counts.sum()),
            "undefined": self.undefined,
            "histogram": self.histogram.tolist(),
        }


def _measure(run: TrainedRun, model: nn.Module, coverage: Coverage) -> Record:
    """A record per stage with a unit: its blocks, and the coefficients of its maps as they are and centered."""
    stages = attended_stages(model)
    moments = measure_maps(run, model, coverage)
    coefficients = [{variant: Coefficients(len(stage.attended)) for variant in VARIANTS} for stage in stages]
    for batch, maps in map_stream(run, model, coverage):
        for h, whole, of_stage in zip(maps, moments, coefficients, strict=True):
            scale = np.sqrt(np.square(h).mean(axis=2))
            of_stage["maps"].add(pearson(h, scale))
            of_stage["centred"].add(pearson(whole.center(h, batch.time), scale))
    records: list[Record] = [
        {
            "name": stage.name,
            "blocks": stage.attended_blocks,
            "channels": stage.channels,
            **{variant: of_stage[variant].summary() for variant in VARIANTS},
        }
        for stage, of_stage in zip(stages, coefficients, strict=True)
    ]
    means = {variant: _mean_of_pairs([record[variant]["mean_by_pair"] for record in records]) for variant in VARIANTS}
    return {"mean": means, "stages": records}


def _mean_of_pairs(matrices: Sequence[Sequence[Sequence[float | None]]]) -> float | None:
    """The mean with equal weight for each pair; the matrices are symmetric, with None on the diagonal."""
    known = [value for matrix in matrices for row in matrix for value in row if value is not None]
    return float(np.mean(known)) if known else None


def describe(record: Record) -> Iterator[str]:
    """The mean correlations at the last step, and of each stage."""
    last = record["steps"][-1]
    yield f"{record['run']}, step {last['step']:,}: {_in_words(last['mean'])}"
    for stage in last["stages"]:
        undefined = stage["maps"]["undefined"]
        constant = f"{undefined:,} undefined (maps with the same value in all channels)" if undefined else ""
        if stage["name"]:
            means = _in_words({variant: stage[variant]["mean"] for variant in VARIANTS})
            yield f"  {stage['name']}, {len(stage['blocks'])} blocks: {'; '.join(filter(None, (means, constant)))}"
        elif constant:
            yield f"  {constant}"


def _in_words(means: dict[str, float | None]) -> str:
    maps, centered = ("undefined" if mean is None else f"{mean:.3f}" for mean in means.values())
    return f"mean correlation {maps}; minus each channel's mean over images {centered}"


# ---- figure

TITLES = {"maps": "the maps", "centred": "minus channels' means"}
LEGEND = {"maps": "the maps", "centred": "the maps minus each channel's mean over images"}
PAPERS_MEAN = 0.85
BINS_DRAWN = 50  # coarse, so that the histogram of few images has no gaps


def draw(runs: Sequence[Record]) -> Figure:
    """A row per run and stage at the last step: coefficients of each pair of blocks, and their distributions."""
    rows = []
    for run in runs:
        for stage in run["steps"][-1]["stages"]:
            named = f"{run['run']}, {stage['name']}" if stage["name"] else run["run"]
            heats = [_draw_heat(stage, variant, named if variant == "maps" else "") for variant in VARIANTS]
            rows.append([*heats, _draw_distribution(stage, run["steps"][-1]["step"])])
    return Figure(rows, (12.2, 3.3 * len(rows) + 0.6), "below", widths=(1, 1.15, 1.25))


def _draw_heat(stage: Record, variant: str, label: str) -> Panel:
    matrix = np.array(stage[variant]["mean_by_pair"], dtype=float)  # None becomes NaN
    mean = stage[variant]["mean"]
    title = f"{TITLES[variant]}: mean {'undefined' if mean is None else f'{mean:.3f}'}"
    heat = HeatMap(matrix, -1, 1, "RdBu_r", ".2f" if len(matrix) <= 9 else "", None if variant == "maps" else "")
    return Panel([heat], title, block_axis(stage["blocks"], ""), block_axis(stage["blocks"], label))


def _draw_distribution(stage: Record, step: int) -> Panel:
    edges = np.linspace(-1, 1, BINS_DRAWN + 1).repeat(2).tolist()
    items: list[Item] = []
    for index, variant in enumerate(VARIANTS):
        counts = np.array(stage[variant]["histogram"]).reshape(BINS_DRAWN, -1).sum(axis=1)
        density = counts / max(1, counts.sum()) * BINS_DRAWN / 2
        heights = [0, *density.repeat(2).tolist(), 0]
        items.append(Area(edges, heights, LEGEND[variant], index, opacity=0.35, outline=True))
    items.append(Level(PAPERS_MEAN, f"{PAPERS_MEAN}: the paper's average for SE, ECA", "x"))
    note, (maps, centered) = "", (stage[variant]["undefined"] for variant in VARIANTS)
    if maps or centered:
        note = f"undefined of {maps + stage['maps']['coefficients']:,}:\n{maps:,}; minus means {centered:,}"
    x, y = Axis("Pearson's r over channels", low=-1, high=1, grid=False), Axis(ticks={}, low=0, grid=False)
    return Panel(items, f"step {step:,}: images, pairs of blocks", x, y, note)


ANALYSIS = Analysis(_measure, draw, describe, passes=2)  # the means, then the coefficients
