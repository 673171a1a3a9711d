"""An opened source of images, and `ImageSet`: its images by index, decoded once or at each read.

Decoded images are kept in memory, or in a memory-mapped file in the cache if they would take too much memory.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

from dia_diffusion.data.decode import Pixels, reason, to_pixels
from dia_diffusion.environment import usable_cores
from dia_diffusion.errors import InputError, RunError, one_line
from dia_diffusion.io import atomic_file, write_json
from dia_diffusion.reading import read_json_object

Labels = npt.NDArray[np.int64]
OnProgress = Callable[[int, int], None]
"""Called with (done, total)."""
Transform = Callable[[int, Image.Image], Pixels]
"""(k, the k-th image of a batch) -> uint8 (C, H, W)."""

_HASH_BLOCK = 1 << 24  # bytes hashed at a time, so that a memory map is never held whole
_BLOCK = 1 << 26  # decoded bytes held in addition to the result
_VERSION = 1  # increase it when the same file decodes to different pixels than before


@dataclass(frozen=True, eq=False)
class ImageSource:
    """What a data format opens: images that can be read one by one, by index and from several threads."""

    where: str
    """The name or path that the images come from, for messages."""
    names: Sequence[str]
    """One per image, in their order."""
    read: Callable[[int], Image.Image]
    """The image at an index; may raise any error if it can't be read."""
    stamps: Sequence[tuple[int, int]] = ()
    """For files: a pair per file that changes when the file does; the first is its size."""
    labels: Labels | None = None
    """(N,), indices into `class_names`; None if the source has no classes."""
    class_names: tuple[str, ...] | None = None
    array: Pixels | None = None
    """(N, H, W, C), if the images are pixels already."""
    split: str | None = None
    """ "train" or "test"; None if the source has no splits."""
    name: str = ""
    """For records; empty: the last part of the path."""


def array_source(
    where: str,
    array: Pixels,
    labels: Labels | None = None,
    class_names: tuple[str, ...] | None = None,
    split: str | None = None,
) -> ImageSource:
    """A source of images that are pixels already, (N, H, W, C): gray, gray + alpha, RGB or RGBA."""

    def read(index: int) -> Image.Image:
        pixels = array[index]
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)

    names = [f"image {index}" for index in range(len(array))]
    return ImageSource(where, names, read, labels=labels, class_names=class_names, array=array, split=split)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images by index, with their labels: `read(indices)` -> uint8 (B, C, H, W)."""

    name: str
    """For records: "digits", "cifar10", or the last part of the path."""
    split: str | None
    """ "train" or "test"; None if the source has no splits."""
    labels: Labels | None
    """(N,), indices into `class_names`; None if the source has no classes."""
    class_names: tuple[str, ...] | None
    fingerprint: str
    """sha256 over shape, pixels and labels, after crop and resize; of files decoded at each read, over their names,
    sizes and labels."""
    images: Pixels | None = None
    """(N, C, H, W), 0..255, in memory or a read-only memory map; None if images are decoded at each read."""
    source: ImageSource | None = None
    """The source that images are decoded from at each read."""

    def __len__(self) -> int:
        return len(self.images if self.source is None else self.source.names)  # type: ignore[arg-type]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of each decoded image."""
        assert self.images is not None
        _, channels, height, width = self.images.shape
        return channels, height, width

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64], transform: Transform | None = None) -> Pixels:
        """The images at these indices, in this order, uint8 (B, C, H, W), copied into memory.

        Args:
            transform: makes pixels of each image; required if images are decoded at each read, else ignored.

        Raises:
            IndexError: there is no such image.
            InputError: an image can't be decoded.
        """
        if self.images is not None:
            return self.images[np.asarray(indices, dtype=np.int64)]
        assert self.source is not None and transform is not None
        source = self.source

        def decode(k: int) -> Pixels:
            index = int(indices[k])
            name = one_line(f"{source.where}/{source.names[index]}")
            try:
                return transform(k, source.read(index))
            except Exception as error:  # a corrupt file can raise almost anything inside a decoder
                refused = InputError(f"{name} can't be read ({reason(error)})")
                refused.alone = True  # each process reads its own part of a batch
                raise refused from error

        return np.stack(list(self._threads.map(decode, range(len(indices)))))

    def subset(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> "ImageSet":
        """The decoded images at these indices, in this order, copied into memory. Raises IndexError as `read`."""
        images = np.ascontiguousarray(self.read(indices))
        labels = None if self.labels is None else self.labels[np.asarray(indices, dtype=np.int64)]
        own = fingerprint(sha256_of_pixels(images), labels)
        return replace(self, labels=labels, fingerprint=own, images=images)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(min(32, usable_cores()))


def encoded_set(source: ImageSource) -> ImageSet:
    """A source's images, decoded at each read."""
    if source.array is not None:
        content = sha256_of_pixels(source.array)
    else:
        sizes = [size for size, _ in source.stamps]
        content = hashlib.sha256(repr((list(source.names), sizes)).encode()).hexdigest()
    own = fingerprint(content, source.labels)
    return ImageSet(source.name, source.split, source.labels, source.class_names, own, source=source)


def decoded_set(
    source: ImageSource, *, size: int | None, channels: int, cache: Path, memory_limit: int, progress: OnProgress | None
) -> ImageSet:
    """A source's images, all decoded: into memory, or above `memory_limit` bytes into a read-only memory map.

    The memory map is stored in the folder `cache` and reused as long as names, stamps, size and channels are the same;
    an array that needs no change is used as it is.

    Raises:
        InputError: images can't be read; names the first and counts all.
        RunError: the cache can't be written.
    """
    images, content = _decode_all(source, size, channels, cache, memory_limit, progress)
    own = fingerprint(content, source.labels)
    return ImageSet(source.name, source.split, source.labels, source.class_names, own, images)


def sha256_of_pixels(images: Pixels) -> str:
    """The sha256 of the shape and the pixels (N, C, H, W), in C order."""
    step = max(1, _HASH_BLOCK // max(1, images[:1].nbytes))
    return _sha256_of_blocks((images[i : i + step] for i in range(0, len(images), step)), images.shape)


def _sha256_of_blocks(blocks: Iterable[Pixels], shape: tuple[int, ...]) -> str:
    """The same for images that come in consecutive blocks of (n, C, H, W)."""
    digest = hashlib.sha256(f"uint8 {shape}\n".encode())
    for block in blocks:
        digest.update(np.ascontiguousarray(block).data)
    return digest.hexdigest()


def fingerprint(pixels_sha256: str, labels: Labels | None) -> str:
    """The sha256, in hexadecimal, of a set with these pixels and labels (N,)."""
    digest = hashlib.sha256(f"{pixels_sha256} {'unlabelled' if labels is None else 'int64'}\n".encode())
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _decode_all(
    source: ImageSource, size: int | None, channels: int, cache: Path, memory_limit: int, progress: OnProgress | None
) -> tuple[Pixels, str]:
    """uint8 (N, C, H, W), and `sha256_of_pixels`."""
    if (pixels := _unchanged(source.array, size, channels)) is not None:
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


def _unchanged(array: Pixels | None, size: int | None, channels: int) -> Pixels | None:
    """A view (N, C, H, W) of an array that needs no crop, resize or conversion."""
    if array is None or array.shape[3] != channels or (size is not None and array.shape[1:3] != (size, size)):
        return None
    return array.transpose(0, 3, 1, 2)


def _first_shape(decode: Callable[[int], Pixels], count: int) -> tuple[int, ...]:
    """The shape of the first image that can be read; failures are reported when all images are decoded."""
    for index in range(count):
        with suppress(Exception):
            return decode(index).shape
    return 1, 1, 1


def _blocks(
    source: ImageSource, decode: Callable[[int], Pixels], shape: tuple[int, ...], progress: OnProgress | None
) -> Iterator[Pixels]:
    """Consecutive blocks (n, C, H, W), each valid until the next; InputError at the end if an image can't be read."""
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
                    raise ValueError(f"size must be {_extent(shape[1:])} as of the first, got {_extent(pixels.shape)}")
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
                write_json(about, {"where": where, "pixels_sha256": digest})  # before the map that it describes
        except OSError as error:
            raise RunError(f"the decoded images can't be written to {path} ({reason(error)})") from error
        kept = np.load(path, mmap_mode="r", allow_pickle=False), digest
    return kept


def _kept(path: Path, about: Path, shape: tuple[int, ...]) -> tuple[Pixels, str] | None:
    """The map that an earlier run wrote; None if it is missing or damaged."""
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

    with path.open("wb") as file:  # not a memory map: on a full disk, writing to one kills the process
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        return _sha256_of_blocks(written(), shape)


def _key(source: ImageSource, shape: tuple[int, ...], size: int | None) -> str:
    images = [*source.names, *source.stamps] if source.array is None else sha256_of_pixels(source.array)
    where = str(Path(source.where).resolve())
    what = json.dumps([_VERSION, PIL.__version__, where, images, shape, size])
    return hashlib.sha256(what.encode()).hexdigest()[:32]
