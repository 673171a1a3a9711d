from types import SimpleNamespace

import numpy as np
import pytest
from torch_fidelity.metric_fid import fid_statistics_to_metric

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.frechet import frechet_distance


def features(count, dimensions, seed, shift=0.0):
    """Skewed, correlated samples with standard deviations from 1 down to 0.02, like a network's features."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(dimensions).normal(size=(dimensions, dimensions)) / np.sqrt(dimensions)
    spread = np.exp(-4 * np.arange(dimensions) / dimensions)
    return np.maximum((generator.normal(size=(count, dimensions)) + 0.3) @ mixing * spread + shift, 0)


def moments(samples):
    return SimpleNamespace(mean=samples.mean(0), covariance=np.atleast_2d(np.cov(samples, rowvar=False)))


def torch_fidelity_distance(a, b):
    pair = [{"mu": each.mean, "sigma": each.covariance} for each in (a, b)]
    return fid_statistics_to_metric(*pair, verbose=False)["frechet_inception_distance"]


@pytest.mark.parametrize(
    ("dimensions", "count_a", "count_b"),
    [(1, 30, 40), (2, 500, 400), (16, 200, 100), (64, 1000, 600), (64, 40, 600), (64, 30, 20), (256, 100, 900)],
)
def test_equals_torch_fidelity_and_is_symmetric(dimensions, count_a, count_b):
    a, b = moments(features(count_a, dimensions, 0)), moments(features(count_b, dimensions, 1, shift=0.05))
    expected = torch_fidelity_distance(a, b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-12)


def test_equals_the_closed_form_of_commuting_covariances():
    generator = np.random.default_rng(0)
    basis, _ = np.linalg.qr(generator.normal(size=(20, 20)))
    a, b = generator.uniform(0, 2, (2, 20))
    a[3:8] = 0
    mean_a, mean_b = generator.normal(size=(2, 20))
    distance = frechet_distance(
        SimpleNamespace(mean=mean_a, covariance=basis * a @ basis.T),
        SimpleNamespace(mean=mean_b, covariance=basis * b @ basis.T),
    )
    assert distance == pytest.approx(((mean_a - mean_b) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-12)


def steep(decades):
    """40 variances spread over `decades` orders of magnitude, shuffled."""
    return np.random.default_rng(0).permutation(10 ** -np.linspace(0, decades, 40))


def without(variances, dead):
    return np.where(np.isin(np.arange(len(variances)), dead), 0, variances)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (steep(12), steep(12) * 1.1),
        (steep(6), steep(6)[::-1]),
        (steep(2), without(steep(2), range(5))),
        (without(steep(2), range(5)), steep(2)),
        (without(steep(2), range(5)), without(steep(2), range(5, 10))),
        (without(steep(2), range(20)), without(steep(2), range(20, 40))),
    ],
    ids=["steep", "opposed", "dead-in-b", "dead-in-a", "dead-apart", "nothing-in-common"],
)
@pytest.mark.parametrize("rotated", [False, True])
def test_loses_no_digits_of_steep_or_singular_covariances(a, b, rotated):
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(40, 40)))[0] if rotated else np.eye(40)
    distance = frechet_distance(*(SimpleNamespace(mean=np.zeros(40), covariance=basis * c @ basis.T) for c in (a, b)))
    # The rotation rounds the covariances; the square root of a zero's rounding error is 1e-8.
    exactness = 1e-7 if rotated else 1e-12
    assert distance == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=exactness)


def test_all_equal_images_have_a_distance():
    constant = SimpleNamespace(mean=np.ones(5), covariance=np.zeros((5, 5)))
    assert frechet_distance(constant, constant) == 0
    other = moments(features(50, 5, 0))
    expected = ((other.mean - 1) ** 2).sum() + np.trace(other.covariance)
    assert frechet_distance(constant, other) == pytest.approx(expected, rel=1e-12)


def test_refuses_other_dimensions():
    with pytest.raises(InputError, match="64 and of 16 features"):
        frechet_distance(moments(features(99, 64, 0)), moments(features(99, 16, 0)))
