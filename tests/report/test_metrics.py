"""Thinned and smoothed metrics, against loops over all of them."""

import numpy as np
import pytest

from dia_diffusion.report.grids import spread
from dia_diffusion.report.metrics import mean_of_runs, running_mean, thin


def lines(values: list[float | None], batch_size: int = 8) -> list[dict[str, float | int | None]]:
    return [{"step": n, "images": n * batch_size, "loss": value} for n, value in enumerate(values, start=1)]


def test_few_lines_stay_and_many_keep_their_extremes() -> None:
    values = np.random.default_rng(0).lognormal(size=2345).tolist()
    metrics = lines(values)
    assert thin(metrics, "loss", most=2345) == metrics
    thinned = thin(metrics, "loss", most=100)
    assert 50 <= len(thinned) <= 100
    assert [line["step"] for line in thinned] == sorted(line["step"] for line in thinned)
    assert all(line in metrics for line in thinned)
    # Fifty stretches of 46 or 47 lines: any 94 lines in a row hold a whole one, and so do their kept extremes.
    for start in range(0, 2345 - 94, 10):
        kept = [line["loss"] for line in thinned if start < line["step"] <= start + 94]
        assert kept and max(kept) >= np.median(values) and max(values[start : start + 94]) >= max(kept)
    assert {max(values), min(values)} <= {line["loss"] for line in thinned}


def test_what_is_no_number_is_left_out() -> None:
    metrics = lines([1.0, None, 3.0, float("nan"), 5.0])
    assert [line["loss"] for line in thin(metrics, "loss")] == [1.0, 3.0, 5.0]
    assert running_mean(metrics, "loss") == ([8, 24, 40], [1.0, 3.0, 5.0])
    assert running_mean(metrics, "nothing") == ([], [])


def test_running_mean_is_that_of_a_loop() -> None:
    values = np.random.default_rng(1).normal(size=100).tolist()
    images, means = running_mean(lines(values), "loss")
    for place, mean in zip(images, means, strict=True):
        middle = place // 8 - 1
        assert mean == pytest.approx(sum(values[middle - 2 : middle + 3]) / 5)
    assert len(means) == 96


def test_mean_of_runs_is_over_those_that_have_come_furthest() -> None:
    mean = mean_of_runs([lines([1.0, None, 3.0]), lines([7.0]), lines([3.0, 6.0, 9.0])], "loss")
    assert mean == [line for line in lines([2.0, 0.0, 6.0]) if line["loss"]]
    assert mean_of_runs([], "loss") == mean_of_runs([[], []], "loss") == []


def test_spread_keeps_the_ends() -> None:
    assert spread([1, 2, 3], 5) == [1, 2, 3]
    assert spread(list(range(101)), 5) == [0, 25, 50, 75, 100]
