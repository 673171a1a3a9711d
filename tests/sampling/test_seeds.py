import pytest

from dia_diffusion.errors import InputError
from dia_diffusion.sampling.settings import parse_seeds, shard


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
def test_shares_are_even_and_make_the_whole(world_size):
    shares = [list(shard(range(10), rank, world_size)) for rank in range(world_size)]
    assert sorted(item for share in shares for item in share) == list(range(10))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
