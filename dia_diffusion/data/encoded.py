"""Images that stay files until they are needed: sets too large to be decoded once, or cropped anew at each sight."""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dia_diffusion.data.decode import reason
from dia_diffusion.data.image_set import Labels, Pixels, Undecoded, fingerprint, sha256_of_pixels
from dia_diffusion.data.sources import find_images
from dia_diffusion.environment import usable_cores
from dia_diffusion.errors import InputError, one_line


@dataclass(frozen=True, eq=False)
class EncodedSet:
    """Images by index, each decoded when it is asked for; names as in `ImageSet`."""

    name: str
    split: str | None
    source: Undecoded
    labels: Labels | None
    class_names: tuple[str, ...] | None
    fingerprint: str
    """sha256 over names, sizes and labels; of arrays over their pixels and labels."""
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_threads()))

    def __len__(self) -> int:
        return len(self.source.names)

    def start(
        self, indices: npt.NDArray[np.int64], work: Callable[[int, Image.Image], Pixels]
    ) -> "list[Future[Pixels]]":
        """Begins to make pixels of images: work(k, image) gets the k-th of these. `gather` waits for them."""

        def one(k: int, index: int) -> Pixels:
            try:
                return work(k, self.source.read(index))
            except Exception as error:  # a corrupt file can raise almost anything inside a decoder
                name = one_line(f"{self.source.where}/{self.source.names[index]}")
                refused = InputError(f"{name} can't be read ({reason(error)})")
                refused.alone = True  # each process reads its own part of a batch
                raise refused from error

        return [self.pool.submit(one, k, int(index)) for k, index in enumerate(indices)]


def gather(futures: "list[Future[Pixels]]") -> Pixels:
    """The pixels, stacked (B, C, H, W). Raises InputError for an image that can't be read."""
    return np.stack([future.result() for future in futures])


def open_encoded(source: str | Path, split: str = "train") -> EncodedSet:
    """Finds a source's images without decoding them. Raises InputError as `open_images` does for what it finds."""
    name, found = find_images(source, split=split)
    if found.array is not None:
        content = sha256_of_pixels(found.array)
    else:
        sizes = [stamp[0] for stamp in found.stamps]
        content = hashlib.sha256(repr((list(found.names), sizes)).encode()).hexdigest()
    return EncodedSet(name, found.split, found, found.labels, found.class_names, fingerprint(content, found.labels))


def _threads() -> int:
    return min(32, usable_cores())
