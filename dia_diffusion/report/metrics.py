"""Lines of a run's metrics.jsonl, thinned and smoothed for plots."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dia_diffusion.report.grids import spread
from dia_diffusion.training.run_folder import RunFolder, read_metrics

MOST_POINTS = 10_000
"""Of a metric in a run's plot: 500,000 steps, logged every 50."""
SMOOTHED_OVER = 20
"""A running mean is over this part of a run."""

Metrics = Sequence[dict[str, Any]]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run; none where it has not begun."""
    file = RunFolder(run).metrics
    return read_metrics(file) if file.is_file() else []


def thin(metrics: Metrics, key: str, most: int = MOST_POINTS) -> list[dict[str, Any]]:
    """At most `most` of the lines: of each of `most` / 2 stretches those where `key` is lowest and highest."""
    known = [line for line in metrics if _is_number(line.get(key))]
    if len(known) <= most:
        return known
    kept: list[dict[str, Any]] = []
    for stretch in np.array_split(np.arange(len(known)), most // 2):
        lines = [known[index] for index in stretch]
        ends = {line["step"]: line for line in (_extreme(lines, key, 1), _extreme(lines, key, -1))}
        kept += [ends[step] for step in sorted(ends)]
    return kept


def running_mean(metrics: Metrics, key: str, most: int = MOST_POINTS) -> tuple[list[int], list[float]]:
    """The mean of the values around a line: images seen and mean of at most `most` of them, evenly spaced."""
    known = [line for line in metrics if _is_number(line.get(key))]
    if not known:
        return [], []
    window = max(1, len(known) // SMOOTHED_OVER)
    means = np.convolve([line[key] for line in known], np.full(window, 1 / window), mode="valid")
    kept = spread(range(len(means)), most)
    return [known[index + window // 2]["images"] for index in kept], [float(means[index]) for index in kept]


def mean_of_runs(runs: Sequence[Metrics], key: str) -> list[dict[str, Any]]:
    """Lines of the mean over the runs that have come furthest, at the steps that all of these have."""
    by_step = [{line["step"]: line for line in run if _is_number(line.get(key))} for run in runs]
    furthest = max((max(lines, default=0) for lines in by_step), default=0)
    by_step = [lines for lines in by_step if furthest in lines]
    shared = sorted(set.intersection(*(set(lines) for lines in by_step))) if by_step else []
    return [{**by_step[0][step], key: float(np.mean([lines[step][key] for lines in by_step]))} for step in shared]


def peak_memory(metrics: Metrics) -> int | None:
    """In MiB; None where the lines don't tell."""
    key = "peak_memory_mib"
    return max((line[key] for line in metrics if _is_number(line.get(key))), default=None)


def _extreme(lines: Metrics, key: str, sign: int) -> dict[str, Any]:
    return min(lines, key=lambda line: sign * line[key])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
