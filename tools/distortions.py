"""Scores corrupted real images, to calibrate what a given distance means.

python tools/distortions.py cifar10-train-jpeg.zip --reference cifar10-test-jpeg.zip --num 5000 --out fd-cifar10.json
"""

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from dia_diffusion.cli.console import Counter, console
from dia_diffusion.cli.main import run_script
from dia_diffusion.cli.options import Metavar, Positional
from dia_diffusion.cli.shared_options import FeatureOptions, Split, load_features, warn_unreleased
from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import FeatureExtractor
from dia_diffusion.evaluation.frechet import Moments, frechet_distance, measure
from dia_diffusion.evaluation.record import distance_name
from dia_diffusion.evaluation.reference import choose, reference_statistics
from dia_diffusion.io import write_json
from dia_diffusion.plotting import save_figure
from dia_diffusion.sampling.samplers import parse_seeds
from dia_diffusion.tables import Table

BATCH = 250
Corrupt = Callable[[Tensor, float, torch.Generator], Tensor]
"""uint8 images (B, C, H, W), amount, generator -> uint8 images of the same shape."""


class Options(FeatureOptions):
    """Scores corrupted real images to calibrate the metric, and prints the table."""

    images: Annotated[str, Positional("IMAGES")]
    """The images to corrupt: a folder, a zip, a .npy or .npz file, a CIFAR archive, hf:NAME, digits, cifar10 or
    cifar100."""
    split: Split = "train"
    """Split of IMAGES, if they have splits."""
    reference: Annotated[str, Metavar("DATA")]
    """Other images of the same kind."""
    reference_split: Split = "train"
    """Split of the reference."""
    size: int | None = None
    """Crop and resize all images to this size first."""
    num: int = 10_000
    """Images per row."""
    seeds: str = "0-2"
    """Seeds of the choices of images, such as 0-2; all is repeated for each."""
    out: Annotated[Path | None, Metavar("FILE.json")] = None
    """File for the numbers; a PNG of the images goes next to it."""


def jpeg(images: Tensor, quality: float, generator: torch.Generator) -> Tensor:
    """JPEG compression."""
    compressed = []
    for image in images:
        file = io.BytesIO()
        transforms.to_pil_image(image).save(file, "JPEG", quality=int(quality))
        compressed.append(transforms.pil_to_tensor(Image.open(file)))
    return torch.stack(compressed)


def blur(images: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Gaussian blur with this standard deviation in pixels."""
    return transforms.gaussian_blur(images, kernel_size=2 * int(np.ceil(3 * deviation)) + 1, sigma=deviation)


def noise(images: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise with this standard deviation in gray levels."""
    noisy = images + deviation * torch.randn(images.shape, generator=generator)
    return noisy.round().clamp(0, 255).to(torch.uint8)


# name -> amounts from weak to strong, and the function
CORRUPTIONS: dict[str, tuple[tuple[float, ...], Corrupt]] = {
    "JPEG quality": ((75, 50, 30, 10), jpeg),
    "blur, pixels": ((0.5, 0.75, 1, 2), blur),
    "noise, grey levels": ((4, 8, 16, 32, 64), noise),
}
MISSING_CLASSES = (1, 3, 5)
DUPLICATES = (10, 50, 90)  # percent


@dataclass(frozen=True)
class Case:
    """A choice of images to score, corrupted or not."""

    name: str
    """Such as "blur, pixels", or "unchanged" for the original images."""
    amount: float | None
    images: ImageSet
    indices: np.ndarray
    corrupt: Corrupt | None
    seed: int
    """Seed of the choice of images and of random corruptions."""

    def batches(self) -> Iterator[Tensor]:
        """uint8 images (B, C, H, W)."""
        generator = torch.Generator().manual_seed(self.seed)
        for start in range(0, len(self.indices), BATCH):
            batch = torch.from_numpy(self.images.read(self.indices[start : start + BATCH]))
            yield batch if self.corrupt is None else self.corrupt(batch, self.amount or 0.0, generator)

    def distance(self, extractor: FeatureExtractor, reference: Moments) -> float:
        """Frechet distance of these images to the reference."""
        return frechet_distance(measure(self.batches(), extractor), reference)


def cases(images: ImageSet, num: int, seed: int = 0, others: ImageSet | None = None) -> list[Case]:
    """Cases of `num` images each: unchanged, corrupted, without some classes, with duplicates, and from `others`.

    All except those without some classes start from the same choice of images. Raises InputError if there are too few.
    """
    chosen = choose(len(images), num, seed)
    result = [Case("unchanged", None, images, chosen, None, seed)]
    for name, (amounts, corrupt) in CORRUPTIONS.items():
        result += [Case(name, amount, images, chosen, corrupt, seed) for amount in amounts]
    if images.labels is not None:
        classes = int(images.labels.max()) + 1
        for missing in (missing for missing in MISSING_CLASSES if missing < classes):
            left = np.flatnonzero(images.labels < classes - missing)
            name = f"classes missing of {classes}"
            result.append(Case(name, missing, images, left[choose(len(left), num, seed)], None, seed))
    shuffled = np.random.default_rng(seed).permutation(chosen)
    for percent in DUPLICATES:
        distinct = shuffled[: max(1, num * (100 - percent) // 100)]
        result.append(Case("duplicates, per cent", percent, images, np.resize(distinct, num), None, seed))
    if others is not None:
        indices = choose(len(others), min(num, len(others)), seed)
        result.append(Case(f"other images: {others.name}", None, others, indices, None, seed))
    return result


@dataclass
class Row:
    """The distances of one kind of images, one for each seed."""

    name: str
    amount: float | None
    num_images: int
    distances: list[float]


def run(options: Options) -> None:
    """Scores the corrupted images."""
    seeds = parse_seeds(options.seeds)
    if options.out is not None and options.out.suffix != ".json":
        raise InputError(f"`--out` must be a file ending in .json, got {options.out}; a PNG goes beside it")
    extractor = load_features(options, options.images, "cuda" if torch.cuda.is_available() else "cpu")
    warn_unreleased(options, extractor)
    images = open_images(options.images, split=options.split, size=options.size)
    size = images.shape[-1]
    others = None if images.name == "digits" else open_images("digits", split="train", size=size)
    real = open_images(options.reference, split=options.reference_split, size=size)
    reference = reference_statistics(real, extractor)
    every = [case for seed in seeds for case in cases(images, options.num, seed, others)]
    rows: dict[tuple[str, float | None], Row] = {}
    with Counter("measuring", "cases") as counter:
        for index, case in enumerate(every, start=1):
            row = rows.setdefault((case.name, case.amount), Row(case.name, case.amount, len(case.indices), []))
            row.distances.append(case.distance(extractor, reference.statistics))
            counter(index, len(every))
    console.print(_table(list(rows.values()), distance_name(extractor.name)).to_rich())
    if options.out is None:
        return
    numbers = {
        "features": extractor.name,
        "features_hash": extractor.weights_hash,
        "images": {"name": images.name, "split": images.split, "fingerprint": images.fingerprint},
        "reference": {"name": real.name, "split": real.split, "count": len(real), "hash": reference.hash},
        "size": size,
        "seeds": options.seeds,
        "rows": [vars(row) for row in rows.values()],
    }
    write_json(options.out, numbers)
    figure = options.out.with_suffix(".png")
    draw_corrupted(images, list(rows.values()), figure)
    console.print(f"numbers in {options.out}, images in {figure}")


def _table(rows: list[Row], metric: str) -> Table:
    columns = ["images", "amount", metric, "+-", "images per set", "sets"]
    cells = []
    for row in rows:
        amount = "" if row.amount is None else f"{row.amount:g}"
        deviation = f"{stdev(row.distances):.4f}" if len(row.distances) > 1 else ""
        counts = [f"{row.num_images:,}", str(len(row.distances))]
        cells.append([row.name, amount, f"{mean(row.distances):.4f}", deviation, *counts])
    return Table(columns, cells, left=("images",))


def draw_corrupted(images: ImageSet, rows: list[Row], path: Path) -> None:
    """A PNG with ten images per corruption, and its mean distance."""
    means = {(row.name, row.amount): mean(row.distances) for row in rows}
    strips = [case for case in cases(images, 10) if case.name == "unchanged" or case.corrupt is not None]
    figure = Figure(figsize=(7.2, 6.2), layout="constrained")
    for axis, case in zip(figure.subplots(len(strips), 1), strips, strict=True):
        (batch,) = case.batches()
        strip = batch.expand(-1, 3, -1, -1).permute(2, 0, 3, 1).flatten(1, 2).numpy()  # (H, 10 W, 3)
        height, width = strip.shape[:2]
        axis.imshow(strip, interpolation="nearest")
        axis.set_axis_off()
        title = case.name if case.amount is None else f"{case.name} {case.amount:g}"
        axis.text(-4, height / 2, title, ha="right", va="center", fontsize=8)
        axis.text(width + 4, height / 2, f"{means[case.name, case.amount]:.3g}", va="center", fontsize=8)
    save_figure(figure, path, dpi=150)


if __name__ == "__main__":
    sys.exit(run_script("distortions.py", Options, run))
