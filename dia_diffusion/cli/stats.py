"""`dia-diffusion stats`: makes files of statistics from any images, shows and compares them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from dia_diffusion.cli.console import ConsoleProgress, console
from dia_diffusion.cli.options import Positional
from dia_diffusion.cli.shared_options import FeatureOptions, Split, load_features, warn_unreleased
from dia_diffusion.errors import InputError
from dia_diffusion.validation import Strict

if TYPE_CHECKING:
    from dia_diffusion.evaluation.statistics_file import StatisticsFile


DESCRIPTION = "Makes, shows and compares files of the mean and covariance of images' features."


class MakeOptions(FeatureOptions):
    """Makes a file of statistics of images."""

    source: Annotated[str, Positional("SOURCE")]
    """Images: a folder, a zip, a .npy or .npz file, a CIFAR archive, hf:NAME, digits, cifar10 or cifar100."""
    out: Annotated[Path, Positional("OUT.safetensors")]
    """The file to make."""
    split: Split = "train"
    """Split of SOURCE, for a dataset with splits."""
    size: int | None = None
    """Crop to the center square and resize, as for a model of this size."""
    channels: Literal[1, 3] = 3
    """Channels: 3, or 1 for a model of gray images."""
    num: int | None = Field(None, ge=2)
    """The first N images; all if not given."""
    seed: int | None = Field(None, ge=0)
    """Choose the N at random by this seed instead."""

    @model_validator(mode="after")
    def _check(self) -> "MakeOptions":
        if self.out.suffix != ".safetensors":
            raise InputError(f"`OUT.safetensors` must be a file ending in .safetensors, got {self.out}")
        if self.seed is not None and self.num is None:
            raise InputError("`--seed` must be given with --num, whose images it chooses")
        return self


def make(options: MakeOptions) -> None:
    """Computes the statistics and writes them."""
    import torch

    from dia_diffusion.data import open_images
    from dia_diffusion.evaluation.reference import reference_statistics
    from dia_diffusion.evaluation.statistics_file import read_statistics, write_statistics

    if options.out.exists():
        raise InputError(f"{options.out} exists already; name another file, or remove it")
    extractor = load_features(options, options.source, "cuda" if torch.cuda.is_available() else "cpu")
    warn_unreleased(options, extractor)
    reporter = ConsoleProgress()
    images = open_images(
        options.source,
        split=options.split,
        size=options.size,
        channels=options.channels,
        progress=reporter.reading("images"),
        download_progress=reporter.reading("bytes"),
    )
    _, height, width = images.shape
    if height != width:
        raise InputError(f"{options.source} must have square images, got {height}x{width}; --size makes them square")
    with reporter:
        reference = reference_statistics(images, extractor, count=options.num, seed=options.seed, progress=reporter)
    write_statistics(options.out, reference, extractor)
    _print(read_statistics(options.out))


class ShowOptions(Strict):
    """Shows what a file of statistics was made of, and its size."""

    file: Annotated[Path, Positional("FILE")]
    """A file of `stats make`, or an npz of another program."""


def show(options: ShowOptions) -> None:
    """Prints the file's name and values."""
    from dia_diffusion.evaluation.statistics_file import read_statistics

    _print(read_statistics(options.file))


class CompareOptions(Strict):
    """Prints the Frechet distance between two files of statistics."""

    a: Annotated[Path, Positional("A")]
    """A file of `stats make`, or an npz of another program."""
    b: Annotated[Path, Positional("B")]
    """Another one in the same features."""


def compare(options: CompareOptions) -> None:
    """Prints the distance, and what the files were made of."""
    from dia_diffusion.evaluation.frechet import frechet_distance
    from dia_diffusion.evaluation.record import distance_name
    from dia_diffusion.evaluation.statistics_file import read_statistics, refuse_incomparable

    a, b = read_statistics(options.a), read_statistics(options.b)
    refuse_incomparable(a, b)
    unnamed = [file for file in (a, b) if file.features is None]
    name = "Frechet distance" if unnamed else distance_name(str(a.features))
    console.print(f"{name}: {frechet_distance(a.statistics, b.statistics):.6g}")
    for file in (a, b):
        console.print(f"  {file.path}: {_origin(file)}")
    if unnamed:
        console.print("An npz doesn't name its features: only their number could be compared.")


PARTS = {"make": (MakeOptions, make), "show": (ShowOptions, show), "compare": (CompareOptions, compare)}


def _origin(file: "StatisticsFile") -> str:
    if file.provenance is None:
        return f"{file.statistics.mean.size} features, provenance unknown"
    known = file.provenance
    size = "x".join(map(str, known["shape"]))
    part = f" ({known['split']})" if known["split"] else ""
    return f"{file.statistics.count:,} images of {known['source']}{part}, {size}"


def _print(file: "StatisticsFile") -> None:
    """One line per name and value."""
    import numpy as np

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
