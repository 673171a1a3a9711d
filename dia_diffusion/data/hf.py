"""Hugging Face datasets: from the hub by name, or a folder that `save_to_disk` wrote; their code is never run."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.utils import logging
from PIL import Image

from dia_diffusion.data.decode import bounded, open_image, read_file, reason, stamp_of
from dia_diffusion.data.image_set import ImageSource, Labels
from dia_diffusion.errors import InputError, RunError

PREFIX = "hf:"
OLDEST = 4  # major version of datasets; older versions run the scripts of a dataset


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder, with or without splits."""
    with_splits, alone = ("dataset_dict.json",), ("dataset_info.json", "state.json")
    return any(all((folder / name).is_file() for name in names) for names in (with_splits, alone))


def saved_dataset(folder: Path, split: str) -> ImageSource:
    """The images of a split of a folder that `save_to_disk` wrote; one without splits is "train"."""
    package = _package(str(folder))
    try:
        found = package.load_from_disk(str(folder))
    except Exception as error:  # pyarrow and datasets raise many types for missing or truncated files
        raise InputError(f"{folder} can't be read as a saved dataset ({reason(error)})") from error
    if isinstance(found, package.DatasetDict):
        if split not in found:
            raise InputError(f"`split` must be one of {', '.join(sorted(found))} for {folder}, got {split!r}")
        return replace(_image_source(package, found[split], str(folder)), split=split)
    if split != "train":
        raise InputError(f"`split` must be train for {folder}, which has no splits, got {split!r}")
    return _image_source(package, found, str(folder))


def hub_dataset(source: str, split: str, show_progress: bool) -> ImageSource:
    """The images of a split of "hf:NAME" or "hf:NAME:CONFIG", from the cache of `datasets` or downloaded into it.

    NAME is a dataset on the hub, or a folder of files that `datasets` reads, such as parquet.

    Raises:
        InputError: there is no such dataset, or it has no images.
        RunError: it can't be downloaded.
    """
    name, _, config = source.removeprefix(PREFIX).partition(":")
    if not name:
        raise InputError(f"a Hugging Face dataset must be given as hf:NAME or hf:NAME:CONFIG, got {source!r}")
    package = _package(source)
    try:
        with _output(package, show_progress and sys.stderr.isatty()):
            found = package.load_dataset(name, config or None, split=split)
    except (FileNotFoundError, ValueError, RuntimeError) as error:  # no such name, config or split; or a script
        raise InputError(f"{source} can't be opened ({reason(error)})") from error
    except Exception as error:  # the hub's clients have their own types
        advice = "give a folder that save_to_disk wrote where there is a network"
        raise RunError(f"{source} can't be downloaded ({reason(error)}); {advice}") from error
    record_name = Path(name).resolve().name if Path(name).is_dir() else source
    return replace(_image_source(package, found, source), split=split, name=record_name)


def _package(source: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source} needs the package datasets: pip install 'dia-diffusion[datasets]'") from None
    if int(datasets.__version__.partition(".")[0]) < OLDEST:
        advice = "pip install --upgrade 'dia-diffusion[datasets]'"
        raise InputError(f"{source} needs datasets {OLDEST} or newer, this is {datasets.__version__}: {advice}")
    return datasets


@contextmanager
def _output(package: Any, bars: bool) -> Iterator[None]:
    """Lets `datasets` print progress bars, if wanted, and silences the hub client's message on each retry."""
    shown, verbosity = package.is_progress_bar_enabled(), logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        if not bars:
            package.disable_progress_bars()
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            package.enable_progress_bars()


def _image_source(package: Any, found: Any, where: str) -> ImageSource:
    """The only column of images, still encoded as in their files, and the first column of classes, if any."""
    columns = {
        kind: [name for name, feature in found.features.items() if isinstance(feature, kind)]
        for kind in (package.Image, package.ClassLabel)
    }
    images = columns[package.Image]
    if len(images) != 1:
        got = f"the image columns {', '.join(images)}" if images else f"none of {', '.join(found.features)}"
        raise InputError(f"{where} must have one column of type Image, got {got}")
    if len(found) == 0:
        raise InputError(f"{where} holds no images")
    column = images[0]
    rows = found.with_format(None).select_columns(column).cast_column(column, package.Image(decode=False))

    def read(index: int) -> Image.Image:
        encoded = rows[index][column]
        if encoded["bytes"] is not None:
            return open_image(bounded(encoded["bytes"]))
        return open_image(read_file(Path(encoded["path"])))

    labels, class_names = None, None
    if columns[package.ClassLabel]:
        labels, class_names = _labels(found, columns[package.ClassLabel][0], where)
    names = [f"{column} {index}" for index in range(len(found))]
    stamps = [stamp_of(Path(file["filename"])) for file in found.cache_files]
    return ImageSource(where, names, read, stamps, labels, class_names)


def _labels(found: Any, column: str, where: str) -> tuple[Labels | None, tuple[str, ...] | None]:
    """A column of classes; None if all are hidden (-1), as in some test sets."""
    values = found.with_format(None).select_columns(column).to_dict()[column]
    labels: Labels = np.array([-1 if value is None else value for value in values], dtype=np.int64)
    if (labels < 0).all():
        return None, None
    names = tuple(found.features[column].names)
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(wrong):
        label, row = values[wrong[0]], wrong[0]
        raise InputError(f"column {column} of {where} must be in 0..{len(names) - 1}, got {label} in row {row}")
    return labels, names
