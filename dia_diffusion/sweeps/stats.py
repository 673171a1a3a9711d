"""Means and intervals over seeds, tests between units, and a study's summary: one row per batch size and unit."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
from scipy import integrate, optimize, stats

from dia_diffusion.sweeps.collect import Cost, Point
from dia_diffusion.sweeps.sweep import BASELINE, Study

Key = TypeVar("Key")

LEVEL = 0.95
"""Level of all confidence intervals."""
ROUNDING = 1e-12
"""Relative rounding error of float64 values."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with the confidence interval from Student's t distribution, which is None for one seed."""

    mean: float
    half_width: float | None
    """Half the width of the interval, which is centered at the mean."""
    count: int
    """Number of seeds."""

    @property
    def low(self) -> float | None:
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        return None if self.half_width is None else self.mean + self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one or more values, one per seed."""
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return Estimate(mean, None, count)
    quantile = stats.t.ppf((1 + LEVEL) / 2, count - 1)
    return Estimate(mean, float(quantile * stats.sem(values)), count)


def student_test(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The two-sided p value of the two-sample t-test with equal variances, which the paper uses.

    None if undefined: fewer than two values on a side, or no variation on either side.
    """
    return _unpaired_test(stats.ttest_ind, first, second)


def paired_test(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The two-sided p value of the paired t-test; None if undefined, as above."""
    if len(first) < 2 or not _vary(np.subtract(first, second), [*first, *second]):
        return None
    return _known(stats.ttest_rel, first, second)


def pitman_morgan(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The two-sided p value of Pitman and Morgan's (1939) test of equal variances for paired values.

    Sums and differences are uncorrelated exactly if the variances are equal. None for fewer than three pairs, or if
    sums or differences don't vary.
    """
    sums, differences = np.add(first, second), np.subtract(first, second)
    if len(first) < 3 or not all(_vary(values, [*first, *second]) for values in (sums, differences)):
        return None
    return _known(stats.pearsonr, sums, differences)


def brown_forsythe(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The p value of Brown and Forsythe's (1974) test of equal variances of unpaired values: Levene's with medians.

    None if undefined: fewer than two values on a side, or no variation on either side.
    """
    return _unpaired_test(partial(stats.levene, center="median"), first, second)


def _unpaired_test(test: object, first: Sequence[float], second: Sequence[float]) -> float | None:
    if min(len(first), len(second)) < 2 or not (_vary(first, first) or _vary(second, second)):
        return None
    return _known(test, first, second)


def detectable_difference(count: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """The true mean difference that a two-sided paired t-test with `count` pairs detects with this power.

    In standard deviations of the differences. alpha: the level of the test.
    """
    critical = stats.t.ppf(1 - alpha / 2, count - 1)

    def missing(difference: float) -> float:
        # The other tail is negligible once the power is above one half.
        return float(stats.nct.cdf(critical, count - 1, difference * count**0.5)) - (1 - power)

    return float(optimize.brentq(missing, 0.0, 2 * critical / count**0.5 + 4))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm-adjusted p values (1979) over the tests that are not None; they bound the chance of any false positive."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = largest
    return adjusted


def mean_along(images_seen: Sequence[float], distances: Sequence[float]) -> float | None:
    """The area under a curve (trapezoidal) divided by the range of images it spans; None for fewer than two points."""
    if len(images_seen) < 2:
        return None
    area = integrate.trapezoid(distances, images_seen)
    return float(area / (images_seen[-1] - images_seen[0]))


def _vary(values: Sequence[float] | np.ndarray, computed_from: Sequence[float]) -> bool:
    """Whether values differ by more than rounding; if they don't, scipy returns a p value of 0."""
    return bool(np.ptp(values) > ROUNDING * np.abs(computed_from).max())


def _known(test: object, first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # values that don't vary
        p = float(test(first, second).pvalue)  # type: ignore[operator]
    return p if np.isfinite(p) else None


@dataclass(frozen=True)
class Curve:
    """A unit's distances over training at one batch size, for several seeds at the same steps."""

    images_seen: list[int]
    by_seed: dict[int, list[float]]
    """seed -> distances, one per number of images seen."""

    @property
    def mean(self) -> list[Estimate]:
        """Means over seeds, one per number of images seen."""
        return [estimate(distances) for distances in zip(*self.by_seed.values(), strict=True)]


@dataclass(frozen=True)
class Comparison:
    """A unit's final distances compared with its twin without a unit; None means too few seeds."""

    seeds: list[int]
    """Seeds that both have."""
    difference: Estimate
    """Unit minus twin over these seeds; negative if the unit is better."""
    p_student: float | None
    """Two-sample test with equal variances over all seeds of either."""
    p_paired: float | None
    """Paired test over the common seeds."""
    p_student_holm: float | None = None
    """Holm-adjusted over all the study's tests of this kind."""
    p_paired_holm: float | None = None


@dataclass(frozen=True)
class Row:
    """A unit at a batch size; None means no value yet, or not applicable."""

    batch_size: int
    unit: str
    images_seen: int
    """Images seen by the end of training."""
    planned_seeds: list[int]
    seeds: list[int]
    """Seeds with a final distance."""
    curve_seeds: list[int]
    """Seeds in the curve; see `curve_of`."""
    final: Estimate | None
    best: Estimate | None
    """Estimate of each seed's smallest distance along the curve."""
    mean_along: Estimate | None
    """Estimate of each seed's mean distance along the curve; see `mean_along`."""
    comparison: Comparison | None
    seconds: Estimate | None
    """Training time of the finished runs."""
    time_ratio: float | None
    """Time relative to the twin without a unit, over the common seeds."""
    peak_memory_mib: int | None
    """The largest among the finished runs."""


def curve_of(points: Sequence[Point], unit: str, batch_size: int) -> Curve | None:
    """A unit's curve at a batch size; None if nothing is measured.

    It contains the seeds that are furthest along, at the steps that all of these have, so that all means along a curve
    are over the same seeds.
    """
    by_seed: dict[int, dict[int, float]] = {}
    for point in points:
        if (point.unit, point.batch_size) == (unit, batch_size):
            by_seed.setdefault(point.seed, {})[point.step] = point.distance
    if not by_seed:
        return None
    distances = comparable(dict(sorted(by_seed.items())))
    steps = next(iter(distances.values()))
    return Curve([step * batch_size for step in steps], {seed: [*curve.values()] for seed, curve in distances.items()})


def comparable(curves: Mapping[Key, Mapping[int, float]]) -> dict[Key, dict[int, float]]:
    """The curves (x -> y) that are furthest along, at the x that all of these have, so that means are over the same
    curves at each x.

    Empty if no curve has a point.
    """
    furthest = max((max(curve) for curve in curves.values() if curve), default=0)
    curves = {key: curve for key, curve in curves.items() if furthest in curve}
    shared = sorted(set.intersection(*map(set, curves.values()))) if curves else []
    return {key: {x: curve[x] for x in shared} for key, curve in curves.items()}


def summarize(
    study: Study, points: Sequence[Point], final_points: Sequence[Point], costs: Mapping[str, Cost]
) -> list[Row]:
    """The rows of a study, by batch size and in its order of units.

    Args:
        points: of the curves.
        final_points: one per run with a last distance, all by one protocol.
        costs: of the trained runs, by name.
    """
    rows = []
    for size in study.batch_sizes:
        runs = [run for run in study.runs if run.batch_size == size]
        finals = {
            unit: {p.seed: p.distance for p in final_points if (p.batch_size, p.unit) == (size, unit)}
            for unit in [BASELINE, *study.units]
        }
        paid = {
            unit: {run.seed: costs[run.name] for run in runs if run.unit == unit and run.name in costs}
            for unit in [BASELINE, *study.units]
        }
        for unit in study.units:
            if not (own := [run for run in runs if run.unit == unit]):
                continue
            final, cost = dict(sorted(finals[unit].items())), paid[unit]
            curve = curve_of(points, unit, size) or Curve([], {})
            memory = [one.peak_memory_mib for one in cost.values() if one.peak_memory_mib is not None]
            along = [mean_along(curve.images_seen, distances) for distances in curve.by_seed.values()]
            row = Row(
                batch_size=size,
                unit=unit,
                images_seen=own[0].max_steps * size,
                planned_seeds=sorted(run.seed for run in own),
                seeds=list(final),
                curve_seeds=list(curve.by_seed),
                final=estimate_if_any(final.values()),
                best=estimate_if_any(min(distances) for distances in curve.by_seed.values()),
                mean_along=estimate_if_any(value for value in along if value is not None),
                comparison=None if unit == BASELINE else _compare(final, finals[BASELINE]),
                seconds=estimate_if_any(one.seconds for one in cost.values()),
                time_ratio=None if unit == BASELINE else _time_ratio(cost, paid[BASELINE]),
                peak_memory_mib=max(memory, default=None),
            )
            rows.append(row)
    return _with_holm(rows)


def _compare(unit: Mapping[int, float], twin: Mapping[int, float]) -> Comparison | None:
    seeds = [seed for seed in unit if seed in twin]
    if not seeds:
        return None
    of_unit, of_twin = [unit[seed] for seed in seeds], [twin[seed] for seed in seeds]
    difference = estimate([a - b for a, b in zip(of_unit, of_twin, strict=True)])
    p_student = student_test(list(unit.values()), [twin[seed] for seed in sorted(twin)])
    return Comparison(seeds, difference, p_student, paired_test(of_unit, of_twin))


def _time_ratio(unit: Mapping[int, Cost], twin: Mapping[int, Cost]) -> float | None:
    shared = [seed for seed in unit if seed in twin]
    below = sum(twin[seed].seconds for seed in shared)
    return sum(unit[seed].seconds for seed in shared) / below if below else None


def estimate_if_any(values: Iterable[float]) -> Estimate | None:
    """`estimate`, or None if there are no values."""
    values = list(values)
    return estimate(values) if values else None


def _with_holm(rows: Sequence[Row]) -> list[Row]:
    compared = [row.comparison for row in rows if row.comparison]
    student, paired = holm([c.p_student for c in compared]), holm([c.p_paired for c in compared])
    adjusted = iter(
        replace(comparison, p_student_holm=a, p_paired_holm=b)
        for comparison, a, b in zip(compared, student, paired, strict=True)
    )
    return [replace(row, comparison=next(adjusted)) if row.comparison else row for row in rows]
