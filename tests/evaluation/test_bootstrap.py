from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dia_diffusion.evaluation.frechet import _ResampledDistance, bootstrap_interval, frechet_distance, sums


def reference_of(width: int) -> SimpleNamespace:
    """A reference with a different standard deviation per feature, as in real features."""
    return SimpleNamespace(mean=np.zeros(width), covariance=np.diag(1 / np.arange(1, width + 1)))


REFERENCE = reference_of(16)


def draw(generator: np.random.Generator, count: int, width: int = 16, shift: float = 0.3) -> torch.Tensor:
    """Samples (count, width) of a different Gaussian than the reference: four shifted means, larger deviations."""
    mean = np.where(np.arange(width) < 4, shift, 0.0)
    noise = generator.normal(size=(count, width)) / np.sqrt(np.arange(1, width + 1))
    return torch.from_numpy((mean + 1.3 * noise).astype(np.float32))


def distance_of(features: torch.Tensor) -> float:
    width = features.shape[1]
    return frechet_distance(sums([features], width), reference_of(width))


@pytest.mark.parametrize("count", [10, 300])  # fewer and more rows than features
def test_a_resample_has_the_distance_of_its_rows(count):
    generator = np.random.default_rng(1)
    features = draw(generator, count)
    resampled = _ResampledDistance(features, REFERENCE)
    assert resampled(np.ones(count, int)) == pytest.approx(distance_of(features), rel=1e-5)
    for _ in range(3):
        chosen = generator.integers(count, size=count)
        expected = distance_of(features[chosen])
        assert resampled(np.bincount(chosen, minlength=count)) == pytest.approx(expected, rel=1e-5)


def test_the_interval_is_seeded_the_same_in_blocks_and_reports_its_progress(monkeypatch):
    features, reported = draw(np.random.default_rng(3), 300), []
    first = bootstrap_interval(features, REFERENCE, 1.0, 12, lambda *counts: reported.append(counts))
    assert first == bootstrap_interval(features, REFERENCE, 1.0, 12)
    assert reported == [(index, 12) for index in range(12)]
    monkeypatch.setattr("dia_diffusion.evaluation.frechet.BLOCK", 64)
    assert vars(bootstrap_interval(features, REFERENCE, 1.0, 12)) == pytest.approx(vars(first), rel=1e-6)


@pytest.mark.parametrize(
    ("width", "shift", "too_wide", "held_by_percentiles"),
    # The bias is 7 % and 17 % of the distance.
    [(16, 0.3, 1.0, 54), pytest.param(32, 0.1, 1.09, 40, marks=pytest.mark.long)],
)
def test_intervals_agree_with_fresh_sets_of_images(width, shift, too_wide, held_by_percentiles):
    """Intervals of 60 sets must cover the mean of 1,500 fresh sets and be as wide as their spread.

    Of 60 intervals of 95 %, 57 +- 1.7 hold the mean; plain percentiles hold it less often, and less with more bias.
    """
    generator, count = np.random.default_rng(4), 400
    fresh = np.array([distance_of(draw(generator, count, width, shift)) for _ in range(1500)])
    held, percentiles_held, errors, widths = 0, 0, [], []
    for _ in range(60):
        features = draw(generator, count, width, shift)
        distance = distance_of(features)
        interval = bootstrap_interval(features, reference_of(width), distance, 100)
        held += interval.low <= fresh.mean() <= interval.high
        errors.append(interval.standard_error)
        widths.append(interval.high - interval.low)
        resampled = _ResampledDistance(features, reference_of(width))
        times = [np.bincount(generator.integers(count, size=count), minlength=count) for _ in range(100)]
        low, high = np.quantile([resampled(each) for each in times], [0.025, 0.975])
        percentiles_held += low <= fresh.mean() <= high
    low, high = np.quantile(fresh, [0.025, 0.975])
    assert np.mean(errors) / fresh.std(ddof=1) == pytest.approx(too_wide, rel=0.08)  # the ratio's own error is 2 to 3 %
    assert np.mean(widths) / (high - low) == pytest.approx(too_wide, rel=0.15)
    assert 53 <= held <= 60
    assert percentiles_held <= held_by_percentiles
