"""What every image source is before its images are decoded, cropped and resized."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from dia_diffusion.data.image_set import Labels, Pixels


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
