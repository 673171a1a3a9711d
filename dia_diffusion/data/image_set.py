"""What every image source becomes: undecoded images by index, then uint8 images and labels with a fingerprint."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

_BLOCK = 1 << 24  # bytes hashed at a time, so that a memory map is never held whole


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size, decoded, with their labels; `images[indices]` is all that a training loop needs."""

    name: str
    """For records: "digits", "cifar10", or the last part of the path."""
    split: str | None
    """ "train" or "test"; None where the source has no parts."""
    images: Pixels
    """(N, C, H, W), 0..255; an array in memory or a read-only memory map."""
    labels: Labels | None
    """(N,), indices into `class_names`; None where the source has no classes."""
    class_names: tuple[str, ...] | None
    fingerprint: str
    """sha256 over shape, pixels and labels as they stand here, after crop and resize."""

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> "ImageSet":
        """The images at these indices, in this order, copied into memory; IndexError where one doesn't exist."""
        chosen = np.asarray(indices, dtype=np.int64)
        images = np.ascontiguousarray(self.images[chosen])
        labels = None if self.labels is None else self.labels[chosen]
        return ImageSet(
            self.name, self.split, images, labels, self.class_names, fingerprint(sha256_of_pixels(images), labels)
        )


def sha256_of_pixels(images: Pixels) -> str:
    """The sha256 of the shape and the pixels (N, C, H, W), in C order."""
    step = max(1, _BLOCK // max(1, images[:1].nbytes))
    return sha256_of_blocks((images[i : i + step] for i in range(0, len(images), step)), images.shape)


def sha256_of_blocks(blocks: Iterable[Pixels], shape: tuple[int, ...]) -> str:
    """The same for images that come in consecutive blocks of (n, C, H, W)."""
    digest = hashlib.sha256(f"uint8 {shape}\n".encode())
    for block in blocks:
        digest.update(np.ascontiguousarray(block).data)
    return digest.hexdigest()


def fingerprint(pixels_sha256: str, labels: Labels | None) -> str:
    """The sha256, in hexadecimal, that stands for a set with these pixels and labels (N,)."""
    digest = hashlib.sha256(f"{pixels_sha256} {'unlabelled' if labels is None else 'int64'}\n".encode())
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Undecoded:
    """Images that can be read one by one, by index and from several threads."""

    where: str
    """The name or path that the images come from, for messages."""
    names: Sequence[str]
    """One for each image, in their order."""
    read: Callable[[int], Image.Image]
    """The image at an index; may raise anything where it can't be read."""
    stamps: Sequence[tuple[int, int]] = ()
    """For files: a pair for each that changes when the file does."""
    labels: Labels | None = None
    class_names: tuple[str, ...] | None = None
    array: Pixels | None = None
    """(N, H, W, C), where the images are pixels already."""
    split: str | None = None
    """Which part of the source these are; None where it has no parts."""


def undecoded_array(
    where: str,
    array: Pixels,
    labels: Labels | None = None,
    class_names: tuple[str, ...] | None = None,
    split: str | None = None,
) -> Undecoded:
    """Images that are pixels already, (N, H, W, C): grey, grey + alpha, RGB or RGBA."""

    def read(index: int) -> Image.Image:
        pixels = array[index]
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)

    names = [f"image {index}" for index in range(len(array))]
    return Undecoded(where, names, read, labels=labels, class_names=class_names, array=array, split=split)
