import itertools
import math

import numpy as np
import pytest
from scipy import stats

from dia_diffusion.sweeps.stats import (
    brown_forsythe,
    detectable_difference,
    estimate,
    holm,
    mean_along,
    paired_test,
    pitman_morgan,
    student_test,
)

FIRST = [3.1, 2.7, 3.6, 2.9, 3.3]
SECOND = [2.6, 2.5, 3.2, 3.0, 2.8]


def test_an_interval_is_students():
    found = estimate([1, 2, 3, 4])
    assert found.mean == 2.5
    # 3.182446 is the 97.5 % quantile for 3 degrees of freedom in printed tables; the variance is 5/3.
    assert found.half_width == pytest.approx(3.182446 * math.sqrt(5 / 3 / 4), rel=1e-6)
    low, high = stats.ttest_1samp(FIRST, 0).confidence_interval(0.95)
    assert (estimate(FIRST).low, estimate(FIRST).high) == pytest.approx((low, high))


def test_one_value_has_no_interval():
    found = estimate([2.5])
    assert (found.mean, found.half_width, found.low, found.high, found.count) == (2.5, None, None, None, 1)


def test_the_two_sample_test_is_students_with_equal_variances():
    n = len(FIRST)
    means = [sum(values) / n for values in (FIRST, SECOND)]
    squares = sum((v - m) ** 2 for values, m in zip((FIRST, SECOND), means, strict=True) for v in values)
    pooled = squares / (2 * n - 2)
    t = (means[0] - means[1]) / math.sqrt(pooled * 2 / n)
    assert student_test(FIRST, SECOND) == pytest.approx(2 * stats.t.sf(abs(t), 2 * n - 2))


def test_the_paired_test_is_that_of_the_differences():
    differences = [a - b for a, b in zip(FIRST, SECOND, strict=True)]
    assert paired_test(FIRST, SECOND) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    # The difference's interval at level p ends at zero, so the test and the interval agree.
    found = estimate(differences)
    assert (paired_test(FIRST, SECOND) < 0.05) == (found.low > 0 or found.high < 0)


@pytest.mark.parametrize(
    "values",
    [([1.0], [2.0]), ([2.0, 2.0], [2.0, 2.0]), ([0.5, 0.5], [0.6, 0.6]), ([0.1] * 3, [0.3, 0.3, 0.1 + 0.2])],
)
def test_too_few_or_equal_values_have_no_p(values):
    assert student_test(*values) is None
    assert paired_test(*values) is None
    assert pitman_morgan(*values) is None


def test_pitman_and_morgan_is_the_closed_form_of_the_variances_ratio():
    n, ratio, r = len(FIRST), np.var(FIRST) / np.var(SECOND), np.corrcoef(FIRST, SECOND)[0, 1]
    t = (ratio - 1) * math.sqrt(n - 2) / (2 * math.sqrt(ratio * (1 - r**2)))
    assert pitman_morgan(FIRST, SECOND) == pytest.approx(2 * stats.t.sf(abs(t), n - 2))
    assert pitman_morgan(SECOND, FIRST) == pytest.approx(pitman_morgan(FIRST, SECOND))
    assert pitman_morgan([1.0, 2.0], [2.0, 5.0]) is None


def test_brown_and_forsythe_is_the_analysis_of_variance_of_distances_to_the_median():
    distances = [np.abs(np.subtract(values, np.median(values))) for values in (FIRST, SECOND)]
    assert brown_forsythe(FIRST, SECOND) == pytest.approx(stats.f_oneway(*distances).pvalue)
    assert brown_forsythe([1.0], [1.0, 2.0]) is None and brown_forsythe([1.0, 1.0], [2.0, 2.0]) is None


@pytest.mark.parametrize(("count", "power", "alpha"), [(20, 0.8, 0.05), (6, 0.8, 0.05), (10, 0.9, 0.005)])
def test_a_detectable_difference_is_found_with_its_power(count, power, alpha):
    samples = np.random.default_rng(0).normal(detectable_difference(count, power, alpha), size=(40_000, count))
    seen = (stats.ttest_1samp(samples, 0, axis=1).pvalue < alpha).mean()
    assert seen == pytest.approx(power, abs=0.01)  # five standard errors


@pytest.mark.parametrize(
    "p_values", [[0.01, 0.04, 0.03, 0.005], [0.2, 0.2, 0.9], [0.6], [1e-5, 1e-5, 0.5, 0.011, 0.013]]
)
def test_holm_is_the_closed_bonferroni_test(p_values):
    """By definition, a closed test's p for a hypothesis is the largest over all sets of hypotheses that contain it."""
    indices = range(len(p_values))
    sets = [chosen for size in indices for chosen in itertools.combinations(indices, size + 1)]
    joint = {chosen: min(1.0, len(chosen) * min(p_values[i] for i in chosen)) for chosen in sets}
    expected = [max(p for chosen, p in joint.items() if i in chosen) for i in indices]
    assert holm(p_values) == pytest.approx(expected)


def test_holm_counts_only_tests_that_were_made():
    assert holm([None, 0.02, None, 0.03]) == [None, 0.04, None, 0.04]
    assert holm([None, None]) == [None, None]


def test_the_mean_along_a_curve_is_its_area_over_its_range():
    assert mean_along([100, 300], [4, 2]) == pytest.approx(3)
    # The area under a piecewise linear curve: 100 x 3.5 + 300 x 2.
    assert mean_along([100, 200, 500], [4, 3, 1]) == pytest.approx((350 + 600) / 400)
    assert mean_along([100], [4]) is None
