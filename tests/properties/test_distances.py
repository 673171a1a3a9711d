"""Properties of every Frechet distance and of every sum of statistics."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dia_diffusion.evaluation.frechet import FeatureStatistics, frechet_distance

SEEDS, WIDTHS = st.integers(0, 10**6), st.integers(1, 24)


def features(seed: int, count: int, width: int, rank: int) -> torch.Tensor:
    """(count, width) vectors of this rank, with a random scale and mean."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, rank, generator=generator) @ torch.randn(rank, width, generator=generator)
    scale = 10 ** (4 * torch.rand(1, generator=generator) - 2)
    return mixed * scale + torch.randn(width, generator=generator)


def statistics(*parts: torch.Tensor) -> FeatureStatistics:
    found = FeatureStatistics(parts[0].shape[1])
    for part in parts:
        found.update(part)
    return found


@given(seed=SEEDS, width=WIDTHS, counts=st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_statistics_of_a_union_are_merged_statistics(seed: int, width: int, counts: list[int]) -> None:
    vectors = features(seed, sum(counts) + 2, width, width)
    whole, merged = statistics(vectors), FeatureStatistics(width)
    start = 0
    for count in [*counts, 2]:
        merged = merged.merge(statistics(vectors[start : start + count]))
        start += count
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12, atol=1e-12 * float(vectors.abs().max()))
    scale = float(vectors.abs().max()) ** 2
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-12, atol=1e-12 * scale)
    np.testing.assert_allclose(
        whole.covariance, np.atleast_2d(np.cov(vectors.double().numpy().T)), rtol=1e-9, atol=1e-11 * scale
    )


@given(seed=SEEDS, width=WIDTHS, ranks=st.tuples(WIDTHS, WIDTHS), counts=st.tuples(*[st.integers(2, 60)] * 2))
def test_a_distance_is_symmetric_zero_on_itself_and_not_negative(
    seed: int, width: int, ranks: tuple[int, int], counts: tuple[int, int]
) -> None:
    a, b = (
        statistics(features(seed + index, count, width, rank))
        for index, (count, rank) in enumerate(zip(counts, ranks, strict=True))
    )
    scale = float(np.trace(a.covariance) + np.trace(b.covariance) + np.square(a.mean - b.mean).sum())
    there, back = frechet_distance(a, b), frechet_distance(b, a)
    assert there == pytest.approx(back, rel=1e-6, abs=1e-6 * scale)
    assert there >= -1e-6 * scale and frechet_distance(a, a) == pytest.approx(0, abs=1e-6 * scale)


@given(seed=SEEDS, width=WIDTHS, shift=st.floats(-100, 100))
def test_a_shift_alone_is_its_square(seed: int, width: int, shift: float) -> None:
    vectors = features(seed, 60, width, width).double()
    moved = vectors + shift
    scale = float(np.trace(statistics(vectors).covariance)) + shift**2 * width
    assert frechet_distance(statistics(vectors), statistics(moved)) == pytest.approx(
        shift**2 * width, rel=1e-6, abs=1e-6 * scale
    )
