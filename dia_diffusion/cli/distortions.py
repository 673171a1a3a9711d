"""`dia-diffusion distortions`: scores corrupted real images to calibrate the metric."""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

from rich.table import Table

from dia_diffusion.cli.console import Counter, console
from dia_diffusion.cli.options import Metavar, Positional
from dia_diffusion.cli.shared_options import FeatureOptions, Split, load_features, warn_unreleased
from dia_diffusion.errors import InputError
from dia_diffusion.io import write_json


class Options(FeatureOptions):
    """Scores corrupted real images to calibrate the metric, and prints the table."""

    images: Annotated[str, Positional("IMAGES")]
    """What is corrupted: a folder, a zip, a .npy or .npz file, a CIFAR archive, hf:NAME, digits, cifar10 or
    cifar100."""
    split: Split = "train"
    """Of IMAGES, where they have parts."""
    reference: Annotated[str, Metavar("DATA")]
    """Other images of the same kind."""
    reference_split: Split = "train"
    """Of the reference."""
    size: int | None = None
    """Crop and resize all images to this size first."""
    num: int = 10_000
    """Images per row."""
    seeds: str = "0-2"
    """Choices of images to repeat it with, such as 0-2."""
    out: Annotated[Path | None, Metavar("FILE.json")] = None
    """The numbers; a PNG of the images goes beside it."""


def run(options: Options) -> None:
    """Scores the corrupted images."""
    import torch

    from dia_diffusion.data import open_images
    from dia_diffusion.evaluation.distortions import cases, draw_spoilt
    from dia_diffusion.evaluation.record import distance_name
    from dia_diffusion.evaluation.reference import reference_statistics
    from dia_diffusion.sampling.samplers import parse_seeds

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
    console.print(_table(list(rows.values()), distance_name(extractor.name)))
    if options.out is not None:
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
        draw_spoilt(images, {key: mean(row.distances) for key, row in rows.items()}, figure)
        console.print(f"numbers in {options.out}, images in {figure}")


@dataclass
class Row:
    """The distances of one kind of images, one for each choice of them."""

    name: str
    amount: float | None
    num_images: int
    distances: list[float]


def _table(rows: list[Row], metric: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("images", "amount", metric, "+-", "images per set", "sets"):
        table.add_column(column, justify="left" if column == "images" else "right")
    for row in rows:
        table.add_row(
            row.name,
            "" if row.amount is None else f"{row.amount:g}",
            f"{mean(row.distances):.4f}",
            f"{stdev(row.distances):.4f}" if len(row.distances) > 1 else "",
            f"{row.num_images:,}",
            str(len(row.distances)),
        )
    return table
