"""A run's logged metrics, thinned and smoothed for plots."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from dia_diffusion.sweeps.stats import comparable

SMOOTHED_OVER = 20
"""A running mean covers 1 / SMOOTHED_OVER of a run."""

Curve = tuple[np.ndarray, np.ndarray]
"""Images seen and values of a metric."""
T = TypeVar("T")


def metric(lines: Sequence[dict[str, Any]], key: str) -> Curve:
    """The values of a metric."""
    known = [line for line in lines if line.get(key) is not None]
    return np.array([line["images"] for line in known]), np.array([line[key] for line in known], dtype=float)


def thin(x: np.ndarray, y: np.ndarray, most: int) -> Curve:
    """At most `most` points: the lowest and the highest of each of `most` / 2 segments."""
    if len(x) <= most:
        return x, y
    segments = np.array_split(np.arange(len(y)), most // 2)
    kept = sorted({int(part[end(y[part])]) for part in segments for end in (np.argmin, np.argmax)})
    return x[kept], y[kept]


def running_mean(x: np.ndarray, y: np.ndarray, most: int) -> Curve:
    """At most `most` evenly spaced means, each over the values around a point."""
    if not len(y):
        return x, y
    window = max(1, len(y) // SMOOTHED_OVER)
    means = np.convolve(y, np.full(window, 1 / window), mode="valid")
    kept = np.array(spread(range(len(means)), most))
    return x[kept + window // 2], means[kept]


def mean_of_runs(runs: Sequence[Curve]) -> Curve:
    """The mean over the runs that are furthest along, at the image counts that all of these have."""
    curves = comparable({run: dict(zip(x.tolist(), y.tolist(), strict=True)) for run, (x, y) in enumerate(runs)})
    shared = next(iter(curves.values()), {})
    return np.array([*shared], dtype=int), np.array([np.mean([curve[x] for curve in curves.values()]) for x in shared])


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spaced, including the first and the last."""
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, min(len(items), most))]
