import numpy as np
import pytest
import torch

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.frechet import FeatureStatistics


def statistics_of(*batches):
    statistics = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch)
    return statistics


@pytest.fixture
def features():
    return torch.randn(101, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 8) + 5


def test_far_from_zero_the_covariance_keeps_its_digits():
    features = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)) + 1000
    expected = np.cov(features.double().numpy(), rowvar=False)
    np.testing.assert_allclose(statistics_of(features).covariance, expected, atol=1e-8)


def test_subtracting_a_part_leaves_the_rest(features):
    rest = statistics_of(features).merge(statistics_of(features[:40]), sign=-1)
    assert rest.count == 61
    np.testing.assert_allclose(rest.mean, features[40:].double().mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(rest.covariance, np.cov(features[40:].double().numpy(), rowvar=False), rtol=1e-10)


def test_low_precision_features_are_summed_in_float64():
    ones = torch.ones(300, 2, dtype=torch.bfloat16)
    assert statistics_of(ones).mean.tolist() == [1.0, 1.0]


def test_one_image_has_no_covariance(features):
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        _ = statistics_of(features[:1]).covariance
