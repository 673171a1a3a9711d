"""Which images: lists of seeds, and each process's share of them."""

import re
from collections.abc import Sequence
from typing import TypeVar

from dia_diffusion.errors import InputError, one_line

MAX_SEEDS = 10_000_000
MAX_SEED = 2**32 - 1  # torch's CPU generator ignores higher bits: 7 and 7 + 2**32 would draw the same image

T = TypeVar("T")


def parse_seeds(text: str) -> list[int]:
    """Seeds from text such as "0-63,100,7", in that order.

    Raises:
        InputError: no such list, a seed of 2**32 or more, one named twice, or more than ten million seeds.
    """
    seeds: list[int] = []
    shown = one_line(text)
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,19})(?:-(\d{1,19}))?", part.strip(), flags=re.ASCII)
        if match is None:
            raise InputError(
                f"seeds {shown!r}: {one_line(part)!r} is neither a seed nor a range; accepted: such as 0-63,100,7"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last > MAX_SEED:
            raise InputError(f"seeds must be 0 to {MAX_SEED}, got {one_line(part)!r}")
        if last < first:
            raise InputError(f"a range of seeds must go upwards, got {one_line(part)!r}")
        if len(seeds) + last - first >= MAX_SEEDS:
            raise InputError(f"seeds {shown!r} are more than the {MAX_SEEDS} that are accepted")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) < len(seeds):
        raise InputError(f"seeds {shown!r} name a seed twice; accepted: each seed once")
    return seeds


def my_share(items: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """What process `rank` of `world_size` does: every world_size-th item; the shares differ by one item at most."""
    return items[rank::world_size]
