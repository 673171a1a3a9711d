"""Which images: lists of seeds, and each process's share of them."""

import re
from collections.abc import Sequence
from typing import TypeVar

from dia_diffusion.errors import InputError, one_line

MAX_SEEDS = 10_000_000
MAX_SEED = 2**63 - 1

T = TypeVar("T")


def parse_seeds(text: str) -> list[int]:
    """Seeds from text such as "0-63,100,7", in that order.

    Raises:
        InputError: no such list, a seed named twice, or more than ten million seeds.
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
        if last < first or last > MAX_SEED:
            raise InputError(f"seeds {shown!r}: {one_line(part)!r} is no such range; accepted: upwards, below 2**63")
        if len(seeds) + last - first >= MAX_SEEDS:
            raise InputError(f"seeds {shown!r} are more than the {MAX_SEEDS} that are accepted")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) < len(seeds):
        raise InputError(f"seeds {shown!r} name a seed twice; accepted: each seed once")
    return seeds


def my_share(items: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """What process `rank` of `world_size` does: every world_size-th item; the shares differ by one item at most."""
    return items[rank::world_size]
