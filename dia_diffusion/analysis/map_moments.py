"""Mean and variance of a stage's attention maps, and what the variance of h is made of.

Is h an attention at all? Its variance is split by the law of total variance, over blocks l, channels n, times t and
images i, each block counting alike, and within a block each value:

    Var(h) = Var_l E[h|l] + E_l Var_n E[h|l,n] + E_ln Var_t E[h|l,n,t] + E_lnt Var_i h
             blocks         channels             times                   images

A learned number a block could do what the first term does, a learned vector of channels a block the first two, and
such a vector that knows the time the first three. Only the last needs the features. Of that last one, class_share.py
says what the images' classes explain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SOURCES = ("blocks", "channels", "times", "images")

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MapMoments:
    """Mean and variance of a stage's h over images, each (L, T, N) float64: blocks, times, channels."""

    mean: Values
    variance: Values

    def block(self, index: int) -> "MapMoments":
        """Those of one block alone."""
        return MapMoments(self.mean[index : index + 1], self.variance[index : index + 1])


def split_variance(stages: Sequence[MapMoments]) -> dict[str, float]:
    """The four terms of the variance over all of h, each block counting alike; their sum is the variance."""
    by_channel = [moments.mean.mean(axis=1) for moments in stages]  # (L, N)
    within = [
        (blocks.var(axis=1), moments.mean.var(axis=1).mean(axis=1), moments.variance.mean(axis=(1, 2)))
        for blocks, moments in zip(by_channel, stages, strict=True)
    ]  # three times (L,) a stage
    channels, times, images = (float(np.concatenate(terms).mean()) for terms in zip(*within, strict=True))
    between = float(np.concatenate([blocks.mean(axis=1) for blocks in by_channel]).var())
    return {"blocks": between, "channels": channels, "times": times, "images": images}
