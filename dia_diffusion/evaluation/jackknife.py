"""Frechet distances without the bias of a finite number of images, with jackknife intervals: `fd-inf` and `fdr`."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.stats import t

from dia_diffusion.evaluation.frechet import (
    LEVEL,
    SUM_BLOCK,
    FeatureStatistics,
    Moments,
    frechet_distance,
    sums,
)

ValueWithInterval = tuple[float, float, float]
"""A value, and the ends of its 95 % interval."""


def extrapolated_distance(
    features: torch.Tensor, reference: Moments, parts: Sequence[int], groups: int, seed: int
) -> ValueWithInterval:
    """The Frechet distance of features (N, D) to the reference in the limit of infinitely many images.

    As in Chong and Forsyth 2020 (arXiv 1911.07023), the distance of n images is modeled as FD + slope / n, and FD is
    the intercept of a line through the distances of subsets. The subsets are the images divided into 1, 2, 4, ...
    equal `parts` at random; distances of the parts of one division are averaged, so that each point of the line uses
    all images. An estimate near 0 can be negative. The bias from the reference's own number of images remains.

    The jackknife leaves out each of the `groups` groups of images in turn, which for 20 groups and parts (1, 2, 4)
    takes 67 distances. Memory: a covariance per group.
    """
    shares = _groups(features, groups, seed)
    distances: dict[tuple[int, ...], float] = {}

    def distance(chosen: tuple[int, ...]) -> float:
        if chosen not in distances:
            distances[chosen] = frechet_distance(_merged(shares, chosen), reference)
        return distances[chosen]

    def estimate(kept: Sequence[int]) -> float:
        means = []
        for number in parts:
            subsets = [tuple(np.intersect1d(part, kept)) for part in np.array_split(range(groups), number)]
            counts = [sum(shares[index].count for index in subset) for subset in subsets]
            means.append(np.average([distance(subset) for subset in subsets], weights=counts))
        return float(np.polyfit(parts, means, 1)[1])  # the intercept; `parts` are proportional to 1 / n

    return _with_interval(estimate, groups)


def relative_distance(
    features: torch.Tensor, real: torch.Tensor, reference: Moments, groups: int, seed: int
) -> ValueWithInterval:
    """The Frechet distance of features (N, D) to the reference, divided by that of as many real images (N, D).

    The jackknife leaves out each of the `groups` groups of both in turn.
    """
    ours, theirs = (_groups(each, groups, seed) for each in (features, real))

    def estimate(kept: Sequence[int]) -> float:
        above, below = (frechet_distance(_merged(shares, kept), reference) for shares in (ours, theirs))
        return above / below

    return _with_interval(estimate, groups)


def _groups(features: torch.Tensor, groups: int, seed: int) -> list[FeatureStatistics]:
    """The statistics of images divided at random into groups of nearly equal size."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(features)))
    return [sums(features[part].split(SUM_BLOCK), features.shape[1]) for part in order.tensor_split(groups)]


def _merged(shares: Sequence[FeatureStatistics], chosen: Sequence[int]) -> FeatureStatistics:
    total = FeatureStatistics(shares[0].sum.numel())
    for index in chosen:
        total = total.merge(shares[index])
    return total


def _with_interval(estimate: Callable[[Sequence[int]], float], groups: int) -> ValueWithInterval:
    """An estimate from all groups, with Student's interval of the delete-a-group jackknife."""
    value = estimate(range(groups))
    replicates = np.array([estimate([each for each in range(groups) if each != index]) for index in range(groups)])
    error = np.sqrt((groups - 1) * replicates.var())
    margin = float(error * t.ppf((1 + LEVEL) / 2, groups - 1))
    return value, value - margin, value + margin
