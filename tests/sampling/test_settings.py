"""Sampling settings: what they make of classes."""

import pytest

from dia_diffusion.sampling.settings import SamplingSettings


@pytest.mark.parametrize(
    ("classes", "seeds", "columns"),
    [
        (range(10), range(100), 10),
        (range(10), range(80), 10),
        (range(10), range(5, 105), 10),
        (range(10), [*range(20), *range(40, 60)], 10),
        (range(2), range(64), 8),
        ([7], range(64), 8),
        (range(10), range(1000), 30),
        (range(10), [0, 2, 1, *range(3, 100)], None),
        (range(1000), range(64), None),
        (None, range(64), None),
    ],
)
def test_columns_of_a_grid_are_of_one_class_each(classes, seeds, columns):
    settings = SamplingSettings(classes=None if classes is None else tuple(classes))
    assert settings.grid_columns(seeds) == columns
    if columns is not None:
        for column in range(columns):
            assert len({seed % len(classes) for seed in seeds[column::columns]}) == 1
