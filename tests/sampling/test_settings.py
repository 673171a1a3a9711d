"""Sampling settings: lists of seeds, and the classes of a grid."""

import pytest

from dia_diffusion.distributed import shard
from dia_diffusion.errors import InputError
from dia_diffusion.sampling.samplers import SamplingSettings, parse_seeds


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("0-3,100,7", [0, 1, 2, 3, 100, 7]),
        ("5", [5]),
        (" 1 , 3-3", [1, 3]),
        (str(2**32 - 1), [2**32 - 1]),
    ],
)
def test_parse_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text",
    ["", "a", "-1", "3-1", "0-3,2", "1,,2", "1-2-3", "1.5", "²", str(2**32), "0-4294967296", "0-10000000", "9" * 5000],
)
def test_no_seeds(text):
    with pytest.raises(InputError, match=r"accepted|must") as error:
        parse_seeds(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shards_are_even_and_cover_everything(world_size):
    shares = [list(shard(range(10), rank, world_size)) for rank in range(world_size)]
    assert sorted(item for share in shares for item in share) == list(range(10))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


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
