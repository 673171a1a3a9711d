"""What a distance means: the distance of real images that were spoilt in known ways and by known amounts."""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from dia_diffusion.data import ImageSet
from dia_diffusion.evaluation.features import FeatureExtractor
from dia_diffusion.evaluation.frechet import Moments, frechet_distance, measure
from dia_diffusion.evaluation.reference import choose
from dia_diffusion.io import atomic_file

BATCH = 250
Spoil = Callable[[Tensor, float, torch.Generator], Tensor]
"""uint8 images (B, C, H, W), how strongly, what is random -> uint8 images of the same shape."""


def jpeg(images: Tensor, quality: float, generator: torch.Generator) -> Tensor:
    """Compressed and read again."""
    compressed = []
    for image in images:
        file = io.BytesIO()
        transforms.to_pil_image(image).save(file, "JPEG", quality=int(quality))
        compressed.append(transforms.pil_to_tensor(Image.open(file)))
    return torch.stack(compressed)


def blur(images: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """A Gaussian blur of this standard deviation in pixels."""
    return transforms.gaussian_blur(images, kernel_size=2 * int(np.ceil(3 * deviation)) + 1, sigma=deviation)


def noise(images: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of this standard deviation in grey levels."""
    noisy = images + deviation * torch.randn(images.shape, generator=generator)
    return noisy.round().clamp(0, 255).to(torch.uint8)


# name -> the amounts from weak to strong, and what is done to an image
SPOILS: dict[str, tuple[tuple[float, ...], Spoil]] = {
    "JPEG quality": ((75, 50, 30, 10), jpeg),
    "blur, pixels": ((0.5, 0.75, 1, 2), blur),
    "noise, grey levels": ((4, 8, 16, 32, 64), noise),
}
MISSING_CLASSES = (1, 3, 5)
DUPLICATES = (10, 50, 90)  # per cent


@dataclass(frozen=True)
class Case:
    """Images to be measured: chosen from a set, and perhaps spoilt."""

    name: str
    """Such as "blur, pixels"; "unchanged" for the images as they are."""
    amount: float | None
    images: ImageSet
    indices: np.ndarray
    spoil: Spoil | None
    seed: int
    """Decides which images are chosen, and what is random about spoiling them."""

    def batches(self) -> Iterator[Tensor]:
        """uint8 images (B, C, H, W)."""
        generator = torch.Generator().manual_seed(self.seed)
        for start in range(0, len(self.indices), BATCH):
            batch = torch.from_numpy(self.images.read(self.indices[start : start + BATCH]))
            yield batch if self.spoil is None else self.spoil(batch, self.amount or 0.0, generator)

    def distance(self, extractor: FeatureExtractor, reference: Moments) -> float:
        """The distance of these images to the reference."""
        return frechet_distance(measure(self.batches(), extractor), reference)


def cases(images: ImageSet, num: int, seed: int = 0, others: ImageSet | None = None) -> list[Case]:
    """Cases of `num` images each: unchanged, spoilt, without some classes, with duplicates, and those of `others`.

    All start from the same choice of images, but for those without the last classes, which must choose among the
    classes left. Raises InputError when there are not enough images.
    """
    chosen = choose(len(images), num, seed)
    found = [Case("unchanged", None, images, chosen, None, seed)]
    for name, (amounts, spoil) in SPOILS.items():
        found += [Case(name, amount, images, chosen, spoil, seed) for amount in amounts]
    if images.labels is not None:
        classes = int(images.labels.max()) + 1
        for missing in (missing for missing in MISSING_CLASSES if missing < classes):
            left = np.flatnonzero(images.labels < classes - missing)
            name = f"classes missing of {classes}"
            found.append(Case(name, missing, images, left[choose(len(left), num, seed)], None, seed))
    shuffled = np.random.default_rng(seed).permutation(chosen)
    for percent in DUPLICATES:
        distinct = shuffled[: max(1, num * (100 - percent) // 100)]
        found.append(Case("duplicates, per cent", percent, images, np.resize(distinct, num), None, seed))
    if others is not None:
        indices = choose(len(others), min(num, len(others)), seed)
        found.append(Case(f"other images: {others.name}", None, others, indices, None, seed))
    return found


def draw_spoilt(images: ImageSet, means: Mapping[tuple[str, float | None], float], path: str | Path) -> None:
    """A PNG with a row of ten images for each way of spoiling them, beside the distance by (name, amount)."""
    figure = Figure(figsize=(7.2, 6.2), layout="constrained")
    rows = [case for case in cases(images, 10) if case.name == "unchanged" or case.spoil is not None]
    axes = figure.subplots(len(rows), 1)
    for axis, case in zip(axes, rows, strict=True):
        (batch,) = case.batches()
        strip = batch.expand(-1, 3, -1, -1).permute(2, 0, 3, 1).flatten(1, 2)  # (H, 10 W, 3)
        axis.imshow(strip.numpy(), interpolation="nearest")
        axis.set_axis_off()
        title = case.name if case.amount is None else f"{case.name} {case.amount:g}"
        axis.text(-4, strip.shape[0] / 2, title, ha="right", va="center", fontsize=8)
        axis.text(
            strip.shape[1] + 4, strip.shape[0] / 2, f"{means[case.name, case.amount]:.3g}", va="center", fontsize=8
        )
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
