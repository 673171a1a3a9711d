"""Distances corrected for the bias of a finite number of images, on Gaussians with a known distance."""

import numpy as np
import pytest
import torch

from dia_diffusion.evaluation.frechet import GivenMoments, frechet_distance, sums
from dia_diffusion.evaluation.jackknife import extrapolated_distance, relative_distance

SCALE = 1.3


def deviations(width):
    return 1 / np.sqrt(np.arange(1, width + 1))


def reference_of(width):
    return GivenMoments(np.zeros(width), np.diag(deviations(width) ** 2))


def draw(generator, count, width, shift=0.3, scale=SCALE):
    noise = generator.normal(size=(count, width)) * deviations(width)
    return torch.from_numpy((shift + scale * noise).astype(np.float32))


def truth(width, shift=0.3):
    """The distance of Gaussians with equal axes: |shift|^2 plus the squared differences of the deviations."""
    return width * shift**2 + ((SCALE - 1) ** 2 * deviations(width) ** 2).sum()


@pytest.mark.parametrize(("width", "count"), [pytest.param(2, 200, marks=pytest.mark.long), (16, 200)])
def test_extrapolation_removes_the_bias_and_its_interval_holds_the_truth(width, count):
    generator, reference = np.random.default_rng(width), reference_of(width)
    plain, found, held = [], [], 0
    for _ in range(60):
        features = draw(generator, count, width)
        plain.append(frechet_distance(sums([features], width), reference))
        value, low, high = extrapolated_distance(features, reference, (1, 2, 4), 10, seed=0)
        found.append(value)
        held += low <= truth(width) <= high
    bias, left = np.mean(plain) - truth(width), np.mean(found) - truth(width)
    assert abs(left) < 0.4 * bias
    assert np.square(np.array(found) - truth(width)).mean() < np.square(np.array(plain) - truth(width)).mean()
    assert 51 <= held <= 60  # of 57 +- 1.7


def test_extrapolation_is_a_line_through_the_distances_of_parts():
    """With as many groups as images, the parts are known: here twelve images in groups of one."""
    features, reference = draw(np.random.default_rng(0), 12, 2), reference_of(2)
    order = np.random.default_rng(7).permutation(12)

    def mean(number):
        return np.mean([frechet_distance(sums([features[p]], 2), reference) for p in np.split(order, number)])

    value, low, high = extrapolated_distance(features, reference, (1, 2), 12, seed=7)
    assert value == pytest.approx(2 * mean(1) - mean(2), rel=1e-6)  # Richardson extrapolation from FD(N) and FD(N / 2)
    assert low < value < high and (low + high) / 2 == pytest.approx(value)
    assert extrapolated_distance(features, reference, (1, 2), 12, seed=7) == (value, low, high)


def test_relative_distance_of_real_images_is_one_and_its_interval_holds_it():
    generator, reference = np.random.default_rng(3), reference_of(8)
    held = 0
    for _ in range(40):
        first, second = (draw(generator, 200, 8, shift=0, scale=1) for _ in range(2))
        value, low, high = relative_distance(first, second, reference, 10, seed=0)
        held += low <= 1 <= high
    assert held >= 36
    features = draw(generator, 200, 8)
    value, low, high = relative_distance(features, second, reference, 10, seed=0)
    one, other = (frechet_distance(sums([each], 8), reference) for each in (features, second))
    assert value == pytest.approx(one / other, rel=1e-6) and 1 < low < value < high
