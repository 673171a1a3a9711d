"""Damaged copies of what a file holds."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def cuts(file: Path) -> Iterator[bytes]:
    """The file cut short at every kind of place."""
    content = file.read_bytes()
    header = int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else len(content) // 2
    for length in (0, 1, 4, 8, 8 + header // 2, 8 + header, (8 + header + len(content)) // 2, len(content) - 1):
        if length < len(content):
            yield content[:length]


def flips(content: bytes, count: int | None, seed: int = 0) -> Iterator[bytes]:
    """The content with one bit flipped: each of them, or so many drawn ones."""
    bits: Any = range(8 * len(content))
    for bit in bits if count is None else random.Random(seed).sample(bits, min(count, len(bits))):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def flip_one(file: Path) -> None:
    """Flips one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
