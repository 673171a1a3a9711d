"""Decodes every image of a source once: into memory, or into a memory-mapped file where that would take too much."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL

from dia_diffusion.data.decode import reason, to_pixels
from dia_diffusion.data.image_set import Pixels, Undecoded, sha256_of_blocks, sha256_of_pixels
from dia_diffusion.environment import usable_cores
from dia_diffusion.errors import InputError, RunError, one_line
from dia_diffusion.io import atomic_file, write_json
from dia_diffusion.reading import read_json_object

Progress = Callable[[int, int], None]
"""Called with how many are done, and of how many."""

_BLOCK = 1 << 26  # decoded bytes held beside the result
_VERSION = 1  # to be raised when the same file decodes to other pixels than before


def decode_all(
    source: Undecoded,
    *,
    size: int | None,
    channels: int,
    cache: Path,
    memory_limit: int,
    progress: Progress | None,
) -> tuple[Pixels, str]:
    """All images as uint8 (N, C, H, W), and `sha256_of_pixels`; above `memory_limit` bytes a read-only memory map.

    The memory map lies in the folder `cache` and is found there again as long as names, stamps, size and channels are
    the same; an array that needs no change stays the map it is. Raises InputError where images can't be read (the first
    is named, all are counted) and RunError where the cache can't be written.
    """
    if (pixels := _as_they_are(source.array, size, channels)) is not None:
        pixels = pixels if pixels.nbytes > memory_limit else np.ascontiguousarray(pixels)
        return pixels, sha256_of_pixels(pixels)

    def decode(index: int) -> Pixels:
        return to_pixels(source.read(index), size, channels).transpose(2, 0, 1)

    shape_of_one = _first_shape(decode, len(source.names)) if size is None else (channels, size, size)
    shape = (len(source.names), *shape_of_one)
    blocks = _blocks(source, decode, shape, progress)
    if math.prod(shape) > memory_limit:
        return _mapped(blocks, shape, cache / _key(source, shape, size), source.where)
    images = np.empty(shape, dtype=np.uint8)
    start = 0
    for block in blocks:
        images[start : start + len(block)] = block
        start += len(block)
    return images, sha256_of_pixels(images)


def _as_they_are(array: Pixels | None, size: int | None, channels: int) -> Pixels | None:
    """A view (N, C, H, W) of an array in which nothing has to change."""
    if array is None or array.shape[3] != channels or (size is not None and array.shape[1:3] != (size, size)):
        return None
    return array.transpose(0, 3, 1, 2)


def _first_shape(decode: Callable[[int], Pixels], count: int) -> tuple[int, ...]:
    """That of the first image that can be read; the others are reported when all are decoded."""
    for index in range(count):
        with suppress(Exception):
            return decode(index).shape
    return 1, 1, 1


def _blocks(
    source: Undecoded, decode: Callable[[int], Pixels], shape: tuple[int, ...], progress: Progress | None
) -> Iterator[Pixels]:
    """Consecutive blocks (n, C, H, W), each valid until the next; InputError at the end if images couldn't be read."""
    count = len(source.names)
    threads = min(8, usable_cores())
    length = min(count, max(threads, min(1024, _BLOCK // math.prod(shape[1:]))))
    block = np.empty((length, *shape[1:]), dtype=np.uint8)
    failures: dict[int, str] = {}

    def fill(start: int, offset: int) -> None:
        for k in range(offset, min(length, count - start), threads):
            try:
                pixels = decode(start + k)
                if pixels.shape != shape[1:]:
                    raise ValueError(
                        f"{_extent(pixels.shape)} where the first has {_extent(shape[1:])}: they need one size"
                    )
                block[k] = pixels
            except Exception as error:  # a corrupt file can raise almost anything inside a decoder
                failures[start + k] = reason(error)

    pool = ThreadPoolExecutor(threads)
    try:
        for start in range(0, count, length):
            list(pool.map(fill, [start] * threads, range(threads)))
            done = min(start + length, count)
            if progress is not None:
                progress(done, count)
            if not failures:
                yield block[: done - start]
    finally:
        pool.shutdown(cancel_futures=True)
    if failures:
        first = min(failures)
        name = one_line(f"{source.where}/{source.names[first]}")
        raise InputError(f"{len(failures)} of {count} images can't be read, first: {name} ({failures[first]})")


def _extent(shape: tuple[int, ...]) -> str:
    return f"{shape[2]} x {shape[1]}"


def _mapped(blocks: Iterator[Pixels], shape: tuple[int, ...], stem: Path, where: str) -> tuple[Pixels, str]:
    path, about = stem.with_suffix(".npy"), stem.with_suffix(".json")
    if (kept := _kept(path, about, shape)) is None:
        try:
            with atomic_file(path) as temporary:
                digest = _write(temporary, blocks, shape)
                write_json(about, {"where": where, "pixels_sha256": digest})  # there before what it is about
        except OSError as error:
            raise RunError(f"the decoded images can't be written to {path} ({reason(error)})") from error
        kept = np.load(path, mmap_mode="r", allow_pickle=False), digest
    return kept


def _kept(path: Path, about: Path, shape: tuple[int, ...]) -> tuple[Pixels, str] | None:
    """What an earlier start has written; None where that isn't there, or not as it was written."""
    try:
        if not path.is_file():
            return None
        pixels, digest = np.load(path, mmap_mode="r", allow_pickle=False), read_json_object(about)["pixels_sha256"]
    except (OSError, ValueError, KeyError, EOFError):
        return None
    whole = pixels.shape == shape and pixels.dtype == np.uint8 and isinstance(digest, str)
    return (pixels, digest) if whole else None


def _write(path: Path, blocks: Iterator[Pixels], shape: tuple[int, ...]) -> str:
    """Writes a .npy file and returns `sha256_of_pixels`."""

    def written() -> Iterator[Pixels]:
        for block in blocks:
            file.write(block.data)
            yield block

    with path.open("wb") as file:  # not a map: on a full disk, writing to one ends the process
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        return sha256_of_blocks(written(), shape)


def _key(source: Undecoded, shape: tuple[int, ...], size: int | None) -> str:
    images = [*source.names, *source.stamps] if source.array is None else sha256_of_pixels(source.array)
    where = str(Path(source.where).resolve())
    what = json.dumps([_VERSION, PIL.__version__, where, images, shape, size])
    return hashlib.sha256(what.encode()).hexdigest()[:32]
