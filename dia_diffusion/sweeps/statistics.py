"""Means over seeds, differences between units in mean and spread, and what tests say of them."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import integrate, optimize, stats

LEVEL = 0.95
"""Of every confidence interval."""
ROUNDING = 1e-12
"""Of float64 values, relative."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with the confidence interval that Student's t distribution gives; None for one seed."""

    mean: float
    half_width: float | None
    """Half of the interval, which is about the mean."""
    count: int
    """Seeds."""

    @property
    def low(self) -> float | None:
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        return None if self.half_width is None else self.mean + self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of at least one value, one a seed."""
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return Estimate(mean, None, count)
    quantile = stats.t.ppf((1 + LEVEL) / 2, count - 1)
    return Estimate(mean, float(quantile * stats.sem(values)), count)


def student_test(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The two-sided p of the two-sample test with equal variances, which is the paper's.

    None where it says nothing: fewer than two values on a side, or values that don't vary on either.
    """
    if min(len(first), len(second)) < 2 or not (_vary(first, first) or _vary(second, second)):
        return None
    return _known(stats.ttest_ind, first, second)


def paired_test(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The two-sided p of the test on the differences of values that belong together, pair by pair; None as above."""
    if len(first) < 2 or not _vary(np.subtract(first, second), [*first, *second]):
        return None
    return _known(stats.ttest_rel, first, second)


def pitman_morgan(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The two-sided p of Pitman and Morgan's (1939) test that values that belong together have one variance.

    Their sums and differences are uncorrelated exactly where the variances are equal. None for fewer than three pairs,
    or where sums or differences don't vary.
    """
    sums, differences = np.add(first, second), np.subtract(first, second)
    if len(first) < 3 or not all(_vary(values, [*first, *second]) for values in (sums, differences)):
        return None
    return _known(stats.pearsonr, sums, differences)


def brown_forsythe(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The p of Brown and Forsythe's (1974) test of equal variances: Levene's, about the medians, of unpaired values.

    None where it says nothing: fewer than two values on a side, or values that don't vary on either.
    """
    if min(len(first), len(second)) < 2 or not (_vary(first, first) or _vary(second, second)):
        return None
    return _known(partial(stats.levene, center="median"), first, second)


def detectable_difference(count: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """The true mean difference that the two-sided paired t-test of `count` pairs sees with this power.

    In standard deviations of the differences. alpha: the level of the test.
    """
    critical = stats.t.ppf(1 - alpha / 2, count - 1)

    def missing(difference: float) -> float:
        # The other tail adds nothing once the power is above a half.
        return float(stats.nct.cdf(critical, count - 1, difference * count**0.5)) - (1 - power)

    return float(optimize.brentq(missing, 0.0, 2 * critical / count**0.5 + 4))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's (1979) p values for as many tests as are not None: with them, the chance of any false finding is p."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = largest
    return adjusted


def mean_along(images_seen: Sequence[float], distances: Sequence[float]) -> float | None:
    """The area under a curve (trapezoids) over the range of images that it spans; None for fewer than two points."""
    if len(images_seen) < 2:
        return None
    area = integrate.trapezoid(distances, images_seen)
    return float(area / (images_seen[-1] - images_seen[0]))


def _vary(values: Sequence[float] | np.ndarray, computed_from: Sequence[float]) -> bool:
    """Whether they differ by more than rounding: from values that don't, scipy makes a p of 0."""
    return bool(np.ptp(values) > ROUNDING * np.abs(computed_from).max())


def _known(test: object, first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # values that don't vary
        p = float(test(first, second).pvalue)  # type: ignore[operator]
    return p if np.isfinite(p) else None
