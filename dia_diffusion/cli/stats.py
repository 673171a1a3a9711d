"""`dia-diffusion stats`: files of statistics, made of any images, shown and compared."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dia_diffusion.cli.arguments import CommandParser, run_part
from dia_diffusion.cli.console import ConsoleReporter, Counter, console
from dia_diffusion.cli.feature_options import add_feature_options, load_features, tell_unreleased
from dia_diffusion.cli.imports import imports
from dia_diffusion.data import SPLITS, open_images
from dia_diffusion.data.sources import accepted_sources
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.record import distance_name

if TYPE_CHECKING:
    from dia_diffusion.evaluation.statistics_files import StatisticsFile


def run(arguments: Sequence[str]) -> None:
    """Does what the first argument says with the others."""
    description = "Makes, shows and compares files of the mean and covariance of images' features."
    run_part("stats", description, "action", ACTIONS, arguments)


def _make(arguments: Sequence[str]) -> None:
    parser = CommandParser("stats make", "Makes a file of statistics of images.")
    parser.add_argument("source", metavar="SOURCE", help=accepted_sources())
    parser.add_argument("out", metavar="OUT.safetensors", type=Path, help="the file to make")
    add_feature_options(parser)
    parser.add_argument("--split", default="train", choices=SPLITS, help="of SOURCE, where it is a dataset with parts")
    parser.add_argument("--size", type=int, help="crop to the centre square and resize, as for a model of this size")
    parser.add_argument("--channels", type=int, default=3, choices=(1, 3), help="1 for a model of grey images")
    parser.add_argument("--num", type=int, help="the first N images; all if none")
    parser.add_argument("--seed", type=int, help="choose the N at random by this seed instead")
    options = parser.parse_args(arguments)
    _check_make(options)
    with imports():
        import torch

        from dia_diffusion.evaluation.reference import reference_statistics
        from dia_diffusion.evaluation.statistics_files import read_statistics, write_statistics
    extractor = load_features(options, options.source, "cuda" if torch.cuda.is_available() else "cpu")
    tell_unreleased(options, extractor)
    reporter = ConsoleReporter()
    images = open_images(
        options.source,
        split=options.split,
        size=options.size,
        channels=options.channels,
        progress=partial(reporter.reading, "images"),
        download_progress=partial(reporter.reading, "bytes"),
    )
    _, height, width = images.shape
    if height != width:
        raise InputError(f"{options.source} has images of {height}x{width}; give --size to make them square")
    with Counter(f"measuring {images.name}", "images") as counter:
        reference = reference_statistics(images, extractor, count=options.num, seed=options.seed, progress=counter)
    write_statistics(options.out, reference, extractor)
    _print(read_statistics(options.out))


def _check_make(options: argparse.Namespace) -> None:
    if options.out.suffix != ".safetensors":
        raise InputError(f"OUT is {options.out}; accepted: a file ending in .safetensors")
    if options.out.exists():
        raise InputError(f"{options.out} exists already; name another file, or remove it")
    if options.num is not None and options.num < 2:
        raise InputError(f"--num is {options.num}; accepted: 2 or more")
    if options.seed is not None and (options.num is None or options.seed < 0):
        raise InputError(f"--seed {options.seed} chooses --num images at random; accepted: 0 or more, with --num")


def _show(arguments: Sequence[str]) -> None:
    parser = CommandParser("stats show", "Shows what a file of statistics was made of, and its size.")
    parser.add_argument("file", metavar="FILE", type=Path, help="a file of `stats make`, or an npz of another program")
    options = parser.parse_args(arguments)
    with imports():
        from dia_diffusion.evaluation.statistics_files import read_statistics
    _print(read_statistics(options.file))


def _compare(arguments: Sequence[str]) -> None:
    parser = CommandParser("stats compare", "Prints the Frechet distance between two files of statistics.")
    parser.add_argument("a", metavar="A", type=Path, help="a file of `stats make`, or an npz of another program")
    parser.add_argument("b", metavar="B", type=Path, help="another one in the same features")
    options = parser.parse_args(arguments)
    with imports():
        from dia_diffusion.evaluation.frechet import frechet_distance
        from dia_diffusion.evaluation.statistics_files import read_statistics, refuse_incomparable
    a, b = read_statistics(options.a), read_statistics(options.b)
    refuse_incomparable(a, b)
    unsaid = [file for file in (a, b) if file.features is None]
    name = "Frechet distance" if unsaid else distance_name(str(a.features))
    console.print(f"{name}: {frechet_distance(a.statistics, b.statistics):.6g}")
    for file in (a, b):
        console.print(f"  {file.path}: {_told(file)}")
    if unsaid:
        console.print("An npz doesn't name its features: that they are the same is only known from their number.")


def _told(file: "StatisticsFile") -> str:
    if file.provenance is None:
        return f"{file.statistics.mean.size} features, provenance unknown"
    known = file.provenance
    size = "x".join(map(str, known["shape"]))
    part = f" ({known['split']})" if known["split"] else ""
    return f"{file.statistics.count:,} images of {known['source']}{part}, {size}"


def _print(file: "StatisticsFile") -> None:
    """Name and value, one a line."""
    rows = {"file": str(file.path)}
    for name, value in (file.provenance or {"provenance": "unknown, an npz says nothing of it"}).items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        if value is None:
            value = "none"
        rows[name.replace("_", " ")] = "x".join(map(str, value)) if isinstance(value, list) else str(value)
    rows["count"] = "unknown" if file.statistics.count is None else f"{file.statistics.count:,} images"
    rows["dimension"] = f"{file.statistics.mean.size} features"
    rows["norm of the mean"] = f"{np.linalg.norm(file.statistics.mean):.6g}"
    rows["trace of the covariance"] = f"{np.trace(file.statistics.covariance):.6g}"
    width = max(map(len, rows))
    for name, value in rows.items():
        console.print(f"{name:<{width}}  {value}")


ACTIONS = {"make": _make, "show": _show, "compare": _compare}
