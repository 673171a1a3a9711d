"""What every image source becomes: uint8 images and labels by index, with a fingerprint of both."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
