"""How alike the attention maps of two blocks are (Fig. 2): Pearson's coefficient over channels, image by image.

For an image x and blocks i < j of one stage (the same channels) with maps h_i(x), h_j(x) in R^N:

    r_ij(x) = corr_n(h_i(x)_n, h_j(x)_n)

The paper finds averages above 0.85 for SE and ECA. That alone doesn't say whether the maps attend to the image alike:
two constant vectors that have the same large and small channels correlate as much. So the same coefficient is taken
of the maps less each channel's mean over images (at the same time), beside it: what is left of the likeness once the
channels' own levels are gone. A vector with the same value in all channels has no correlation; those are counted.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from dia_diffusion.analysis.attention_maps import measure_maps
from dia_diffusion.analysis.map_stream import Maps, centred, map_stream
from dia_diffusion.analysis.stages import attended_stages
from dia_diffusion.analysis.trained_run import DEFAULT_COVERAGE, Coverage, TrainedRun

VARIANTS = ("maps", "centred")
BINS = 400  # of the coefficients' histogram, over -1..1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CONSTANT = 1e-6  # deviation over channels, of the map's root mean square, below which a float32 map is constant
PASSES = 2  # over the images: the means first, then the coefficients


def pearson(h: Maps, scale: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
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


def correlations(run: TrainedRun, model: nn.Module, coverage: Coverage) -> list[dict[str, Any]]:
    """A record a stage with a unit: its blocks, and the coefficients of its maps as they are and centred."""
    stages = attended_stages(model)
    moments = measure_maps(run, model, coverage)
    found = [{variant: Coefficients(len(stage.attended)) for variant in VARIANTS} for stage in stages]
    for time, maps in map_stream(run, model, coverage):
        for h, whole, record in zip(maps, moments, found, strict=True):
            scale = np.sqrt(np.square(h).mean(axis=2))
            record["maps"].add(pearson(h, scale))
            record["centred"].add(pearson(centred(h, whole, time), scale))
    return [
        {
            "name": stage.name,
            "blocks": stage.attended_blocks,
            "channels": stage.channels,
            **{variant: record[variant].summary() for variant in VARIANTS},
        }
        for stage, record in zip(stages, found, strict=True)
    ]


def correlations_of_run(
    run: TrainedRun, steps: Sequence[int] | None = None, coverage: Coverage = DEFAULT_COVERAGE
) -> dict[str, Any]:
    """A run's record: the correlations of each step's averaged weights; `mean` is over all pairs of all stages.

    Raises:
        InputError: the run has no unit, or no weights of a step.
    """
    run.require_unit()
    measured = []
    for step in run.with_first(steps):
        stages = correlations(run, run.model(step), coverage)
        means = {variant: _mean_of_pairs([stage[variant]["mean_by_pair"] for stage in stages]) for variant in VARIANTS}
        measured.append({**run.measured(step), "mean": means, "stages": stages})
    return {**run.described(), "steps": measured}


def _mean_of_pairs(matrices: Sequence[Sequence[Sequence[float | None]]]) -> float | None:
    """Each pair counts alike; both halves of a matrix are the same pairs, its diagonal is None."""
    known = [value for matrix in matrices for row in matrix for value in row if value is not None]
    return float(np.mean(known)) if known else None
