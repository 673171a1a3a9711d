"""`dia-diffusion distortions`: what a distance means, by the distances of real images spoilt in known ways."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from rich.table import Table

from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.console import Counter, console
from dia_diffusion.cli.feature_options import add_feature_options, load_features, tell_unreleased
from dia_diffusion.cli.imports import imports
from dia_diffusion.data import SPLITS, open_images
from dia_diffusion.data.sources import accepted_sources
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.record import distance_name
from dia_diffusion.io import write_json
from dia_diffusion.sampling.samplers import parse_seeds


def run(arguments: Sequence[str]) -> None:
    """Measures what the arguments say."""
    parser = CommandParser("distortions", "Measures real images that are spoilt in known ways, and prints the table.")
    parser.add_argument("images", metavar="IMAGES", help=f"what is spoilt: {accepted_sources()}")
    parser.add_argument("--split", default="train", choices=SPLITS, help="of IMAGES, where they have parts")
    parser.add_argument("--reference", required=True, metavar="DATA", help="other images of the same kind")
    parser.add_argument("--reference-split", default="train", choices=SPLITS, help="of the reference")
    add_feature_options(parser)
    parser.add_argument("--size", type=int, help="crop and resize all images to this size first")
    parser.add_argument("--num", type=int, default=10_000, help="images a row")
    parser.add_argument("--seeds", default="0-2", help="choices of images to repeat it with, such as 0-2")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the numbers; a PNG of the images beside it")
    options = parser.parse_args(arguments)
    seeds = parse_seeds(options.seeds)
    if options.out is not None and options.out.suffix != ".json":
        raise InputError(f"--out is {options.out}; accepted: a file ending in .json, a PNG goes beside it")
    with imports():
        import torch

        from dia_diffusion.evaluation.distortions import cases, draw_spoilt
        from dia_diffusion.evaluation.reference import reference_statistics

    extractor = load_features(options, options.images, "cuda" if torch.cuda.is_available() else "cpu")
    tell_unreleased(options, extractor)
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
    for column in ("images", "amount", metric, "+-", "images a set", "sets"):
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
