"""`open_images`: a name or a path -> an ImageSet, and FORMATS, the registry of data formats."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dia_diffusion.data.arrays import (
    FOLDERS,
    cifar_archive,
    cifar_folder,
    digits,
    is_cifar_folder,
    numpy_archive,
    numpy_file,
)
from dia_diffusion.data.files import SUFFIXES, files_of_folder, files_of_zip, image_names, of_split
from dia_diffusion.data.hf import PREFIX, hub_dataset, is_saved_dataset, saved_dataset
from dia_diffusion.data.image_set import ImageSet, ImageSource, OnProgress, decoded_set, encoded_set
from dia_diffusion.distributed import first_on_each_machine
from dia_diffusion.download import Download, fetch
from dia_diffusion.errors import InputError
from dia_diffusion.io import cache_folder
from dia_diffusion.progress import Progress
from dia_diffusion.registry import Registry

SPLITS = ("train", "test")
MEMORY_LIMIT = 4 << 30
DOWNLOADS = {
    "cifar10": Download(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        170_052_171,
    ),
    "cifar100": Download(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        168_513_733,
    ),
}


@dataclass(frozen=True)
class Request:
    """A request to a data format to open a source."""

    source: str
    """A name or a path, as given."""
    split: str
    """ "train" or "test"."""
    cache: Path
    """Folder for downloads."""
    download_progress: OnProgress | None = None
    """Called with (bytes done, total)."""

    @property
    def path(self) -> Path:
        return Path(self.source)


@dataclass(frozen=True)
class DataFormat:
    """A kind of image source."""

    description: str
    """For messages and help, such as "a uint8 .npy file"."""
    recognizes: Callable[[str], bool]
    """Whether a name or path is of this format."""
    open: Callable[[Request], ImageSource]
    """Its images; raises InputError if they can't be used."""


FORMATS: Registry[DataFormat] = Registry("data format")
"""The first format that recognizes a source opens it. Built-in formats come first, names before paths."""


def accepted_sources() -> str:
    """What `source` of `open_images` may be, for messages and help."""
    *others, last = (row.description for row in FORMATS.values())
    return f"{', '.join(others)}, or {last}"


def find_format(source: str) -> DataFormat | None:
    """The data format of a name or path; None if no format recognizes it."""
    return next((row for row in FORMATS.values() if row.recognizes(source)), None)


def open_images(
    source: str | Path,
    *,
    size: int | None = None,
    channels: int = 3,
    split: str = "train",
    decode: bool = True,
    cache: Path | None = None,
    memory_limit: int = MEMORY_LIMIT,
    progress: OnProgress | None = None,
    download_progress: OnProgress | None = None,
) -> ImageSet:
    """Opens any image source as uint8 images (N, C, H, W), 0..255, with their labels.

    Files are ordered by name.

    Args:
        source: a name or a path, see FORMATS. A name wins over a file of the same name (./digits is the file).
        size: images are cropped to the center square and resized to size x size; None: all have the same size already.
        channels: 3 for RGB, 1 for gray.
        split: "train" or "test". Digits and CIFAR have both; other sources only if their first level is train/, test/.
            A source without splits is "train".
        decode: decode all images now, into memory or the cache; False: at each read, by the reader's transform, and
            `size` and `channels` don't apply.
        cache: folder for downloads and memory maps; None: `io.cache_folder()`.
        memory_limit: bytes of decoded images above which they are memory-mapped instead of kept in memory.
        progress, download_progress: called with (images done, total) and (bytes done, total).

    Raises:
        InputError: the source can't be used; if files can't be read, names the first and counts all.
        RunError: a download failed, or the cache can't be written.
    """
    if size is not None and size < 1:
        raise InputError(f"`size` must be a positive number of pixels or none, got {size}")
    if channels not in (1, 3):
        raise InputError(f"`channels` must be 3 (RGB) or 1 (gray), got {channels}")
    if split not in SPLITS:
        raise InputError(f"`split` must be {' or '.join(SPLITS)}, got {split!r}")
    name, cache = str(source), cache_folder() if cache is None else cache
    if (chosen := find_format(name)) is None:
        raise InputError(f"an image source must be {accepted_sources()}, got {name!r}, which {_kind(Path(name))}")
    found = chosen.open(Request(name, split, cache, download_progress))
    found = found if found.name else replace(found, name=Path(name).resolve().name)
    if not decode:
        return encoded_set(found)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # about odd metadata; real problems raise
        return decoded_set(
            found,
            size=size,
            channels=channels,
            cache=cache / "images",
            memory_limit=memory_limit,
            progress=progress,
        )


def open_images_on_ranks(source: str, accelerator: Accelerator, progress: Progress, **kwargs: Any) -> ImageSet:
    """Opens images on each rank: first on one rank of each machine, then on the others.

    So each machine downloads or memory-maps them once. `memory_limit` is shared by the ranks of a machine.

    Args:
        source: as for `open_images`, like the keyword arguments.
        progress: shows the progress of reading on rank 0.

    Raises:
        InputError: as `open_images`; if any rank raises, all ranks raise.
    """
    if accelerator.is_main_process:
        kwargs |= {"progress": progress.reading("images"), "download_progress": progress.reading("bytes")}
    here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    kwargs = {"memory_limit": MEMORY_LIMIT // here, **kwargs}
    return first_on_each_machine(accelerator, lambda: open_images(source, **kwargs))


def _kind(path: Path) -> str:
    """Describes a path that no format recognizes."""
    if path.is_dir():
        return f"holds no image files ({' '.join(SUFFIXES)})"
    return "is a file of another kind" if path.is_file() else "is not a file or folder"


def _starts_with(source: str, magic: bytes) -> bool:
    """Whether it is a file with these first bytes."""
    path = Path(source)
    if not path.is_file():  # opening a pipe would block
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError as error:
        raise InputError(f"{source!r} can't be read ({error.strerror})") from error


def _is_npz(source: str) -> bool:
    return _starts_with(source, b"PK") and Path(source).suffix.lower() == ".npz"


def _without_splits(opener: Callable[[Path], ImageSource]) -> Callable[[Request], ImageSource]:
    def opened(request: Request) -> ImageSource:
        if request.split != "train":
            raise InputError(f"`split` must be train for {request.path}, which has no splits, got {request.split!r}")
        return opener(request.path)

    return opened


def _downloaded(request: Request) -> ImageSource:
    archive = fetch(DOWNLOADS[request.source], request.cache / "downloads", request.download_progress)
    return replace(cifar_archive(archive, request.split), name=request.source)


for name, row in {
    "digits": DataFormat("digits", lambda source: source == "digits", lambda request: digits(request.split)),
    "cifar-download": DataFormat(", ".join(DOWNLOADS), DOWNLOADS.__contains__, _downloaded),
    "hugging-face": DataFormat(
        "hf:NAME of a Hugging Face dataset",
        lambda source: source.startswith(PREFIX),
        lambda request: hub_dataset(request.source, request.split, request.download_progress is not None),
    ),
    "cifar-folder": DataFormat(
        f"an extracted CIFAR archive ({', '.join(FOLDERS)})",
        lambda source: is_cifar_folder(Path(source)),
        lambda request: cifar_folder(request.path, request.split),
    ),
    "cifar-archive": DataFormat(
        "a CIFAR archive as tar.gz",
        lambda source: _starts_with(source, b"\x1f\x8b"),
        lambda request: cifar_archive(request.path, request.split),
    ),
    "saved-dataset": DataFormat(
        "a folder that a dataset's save_to_disk wrote",
        lambda source: is_saved_dataset(Path(source)),
        lambda request: saved_dataset(request.path, request.split),
    ),
    "npy": DataFormat(
        "a uint8 .npy file", lambda source: _starts_with(source, b"\x93NUMPY"), _without_splits(numpy_file)
    ),
    "npz": DataFormat("a uint8 .npz file", _is_npz, _without_splits(numpy_archive)),
    "zip": DataFormat(
        "a zip of images or class folders",
        lambda source: _starts_with(source, b"PK"),
        lambda request: of_split(files_of_zip(request.path), request.split),
    ),
    "folder": DataFormat(
        "a folder of images or class folders",
        lambda source: Path(source).is_dir() and any(True for _ in image_names(Path(source))),
        lambda request: of_split(files_of_folder(request.path), request.split),
    ),
}.items():
    FORMATS.register(name, row)
