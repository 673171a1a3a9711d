"""Thinned and smoothed metrics, compared with plain loops."""

import numpy as np
import pytest

from dia_diffusion.report.metrics import mean_of_runs, metric, running_mean, spread, thin

EIGHT = 8 * np.arange(1, 3001)
"""Images seen."""


def test_few_points_stay_and_many_keep_their_extremes() -> None:
    y = np.random.default_rng(0).lognormal(size=2345)
    x = EIGHT[:2345]
    assert thin(x, y, most=2345) == (x, y)
    thinned_x, thinned_y = thin(x, y, most=100)
    assert 50 <= len(thinned_x) <= 100 and np.all(np.diff(thinned_x) > 0)
    assert np.array_equal(thinned_y, y[thinned_x // 8 - 1])
    # Fifty chunks of 46 or 47 points: any 94 consecutive points contain a whole chunk, and so its extremes.
    for start in range(0, 2345 - 94, 10):
        kept = thinned_y[(thinned_x // 8 > start) & (thinned_x // 8 <= start + 94)]
        assert kept.max() >= np.median(y)
    assert {y.max(), y.min()} <= set(thinned_y)


def test_lines_without_a_metric_are_left_out() -> None:
    lines = [{"step": n, "images": 8 * n, "loss": value} for n, value in ((1, 1.0), (2, None), (3, 3.0))]
    x, y = metric([*lines, {"step": 4, "images": 32}], "loss")
    assert (x.tolist(), y.tolist()) == ([8, 24], [1.0, 3.0])
    assert [len(part) for part in running_mean(*metric(lines, "nothing"), most=5)] == [0, 0]


def test_running_mean_equals_a_loop() -> None:
    y = np.random.default_rng(1).normal(size=100)
    x, means = running_mean(EIGHT[:100], y, most=1000)
    for images, mean in zip(x, means, strict=True):
        middle = images // 8 - 1
        assert mean == pytest.approx(sum(y[middle - 2 : middle + 3]) / 5)
    assert len(means) == 96
    assert len(running_mean(EIGHT[:100], y, most=10)[0]) == 10


def test_mean_of_runs_is_over_the_runs_that_got_furthest() -> None:
    runs = [([8, 24], [1.0, 3.0]), ([8], [7.0]), ([8, 16, 24], [3.0, 6.0, 9.0]), ([], [])]
    x, y = mean_of_runs([(np.array(x), np.array(y)) for x, y in runs])
    assert (x.tolist(), y.tolist()) == ([8, 24], [2.0, 6.0])
    assert [len(part) for part in mean_of_runs([])] == [0, 0]


def test_spread_keeps_the_ends() -> None:
    assert spread([1, 2, 3], 5) == [1, 2, 3]
    assert spread(list(range(101)), 5) == [0, 25, 50, 75, 100]
    assert spread([], 5) == []
