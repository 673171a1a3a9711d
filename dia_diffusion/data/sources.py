"""Image sources: a name or a path -> the images found there, undecoded, and `open_images` to decode them."""

import os
import stat
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from dia_diffusion.data import decode
from dia_diffusion.data.arrays import digits, numpy_archive, numpy_file
from dia_diffusion.data.cifar import FOLDERS, cifar_archive, cifar_folder
from dia_diffusion.data.decode import bounded, open_image, read_file, stamp_of
from dia_diffusion.data.hf_datasets import PREFIX, hub_dataset, is_saved_dataset, saved_dataset
from dia_diffusion.data.image_set import ImageSet, Undecoded, fingerprint
from dia_diffusion.data.store import Progress, decode_all
from dia_diffusion.distributed import first_on_each_machine
from dia_diffusion.download import Download, fetch
from dia_diffusion.errors import InputError, one_line
from dia_diffusion.io import cache_folder
from dia_diffusion.reading import refuse_bomb

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
SPLIT_FOLDERS = {"train", "test", "val", "valid", "validation"}


def files_of_folder(folder: Path) -> Undecoded:
    """The image files in a folder and its subfolders; hidden names are left out.

    Links are followed; a folder that is reached twice counts once, as a link to a parent would go round in circles.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"folder {one_line(str(error.filename))} can't be listed ({error.strerror})")

    names: list[str] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        names += [Path(place, file).relative_to(folder).as_posix() for file in files]
    names = sorted(name for name in names if _is_image_name(name))

    def read(index: int) -> bytes:
        return read_file(folder / names[index])

    return _files(str(folder), names, read, [stamp_of(folder / name) for name in names])


def files_of_zip(path: Path) -> Undecoded:
    """The image files in a zip, read one at a time, never extracted; one made to do harm is refused (InputError)."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise InputError(f"{path} can't be read as a zip ({one_line(str(error))}), maybe it is cut short") from error
    for entry in archive.infolist():
        if problem := _harm(entry):
            raise InputError(f"zip {path} is refused: its entry {one_line(entry.filename)} {problem}")
    try:
        refuse_bomb(archive, path, only=lambda entry: _is_image_name(_name(entry)))
    except ValueError as error:
        raise InputError(f"zip {path} is refused: {error}") from None
    entries = sorted((entry for entry in archive.infolist() if _is_image_name(_name(entry))), key=_name)

    def read(index: int) -> bytes:
        with archive.open(entries[index]) as file:
            return bounded(file.read(decode.FILE_LIMIT + 1))

    return _files(
        str(path), [_name(entry) for entry in entries], read, [(entry.file_size, entry.CRC) for entry in entries]
    )


def of_split(files: Undecoded, split: str) -> Undecoded:
    """The files of a split, with the labels that their folders say.

    The first level of folders are the classes, where every image lies in one and there are at least two. A single
    folder around everything says nothing and is looked through. A first level of train, test or the like is the split.
    """
    folders = [name.split("/")[:-1] for name in files.names]
    depth = 0
    while len(heads := _heads(folders, depth)) == 1:
        depth += 1
    chosen = list(range(len(folders)))
    has_parts = "train" in heads and heads <= SPLIT_FOLDERS
    if has_parts:
        if split not in heads:
            raise InputError(f"{files.where} has the splits {', '.join(sorted(heads))}, and not {split!r}")
        chosen = [i for i in chosen if folders[i][depth] == split]
        depth += 1
        heads = _heads([folders[i] for i in chosen], depth)
    elif split != "train":
        raise InputError(f"{files.where} has no split {split!r}, it is one set of images: give the path of the others")
    read = files.read
    files = replace(
        files,
        names=[files.names[i] for i in chosen],
        read=lambda index: read(chosen[index]),
        stamps=[files.stamps[i] for i in chosen],
        split=split if has_parts else None,
    )
    if len(heads) < 2:
        return files
    numbers = {name: number for number, name in enumerate(sorted(heads))}
    labels = np.array([numbers[folders[i][depth]] for i in chosen], dtype=np.int64)
    return replace(files, labels=labels, class_names=tuple(numbers))


def _files(where: str, names: list[str], read: Callable[[int], bytes], stamps: list[tuple[int, int]]) -> Undecoded:
    return Undecoded(where, names, lambda index: open_image(read(index)), stamps)


def _heads(folders: list[list[str]], depth: int) -> set[str]:
    """The folder names at this depth; none where an image lies beside them."""
    return set() if any(len(parts) <= depth for parts in folders) else {parts[depth] for parts in folders}


def _is_image_name(name: str) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    return not hidden and name.lower().endswith(SUFFIXES)


def _name(entry: zipfile.ZipInfo) -> str:
    return entry.filename.replace("\\", "/")  # as some Windows programs write them


def _harm(entry: zipfile.ZipInfo) -> str | None:
    name = _name(entry)
    if name.startswith("/") or name[1:2] == ":" or ".." in name.split("/"):
        return "points outside of the archive"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "is a link"
    if not _is_image_name(name):
        return None  # never read
    if entry.file_size > decode.FILE_LIMIT:
        return f"declares more than the {decode.FILE_LIMIT >> 20} MiB accepted for one image"
    return None


SPLITS = ("train", "test")
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
ACCEPTED = (
    f"digits, {', '.join(DOWNLOADS)}, hf:NAME of a Hugging Face dataset, or the path of a folder of images or of class "
    f"folders, of a zip of either, of a CIFAR archive ({', '.join(FOLDERS)}; extracted or tar.gz), of a uint8 .npy or "
    ".npz file, or of a folder that a dataset's save_to_disk wrote"
)
MEMORY_LIMIT = 4 << 30


def open_images(
    source: str | Path,
    *,
    size: int | None = None,
    channels: int = 3,
    split: str = "train",
    cache: Path | None = None,
    memory_limit: int = MEMORY_LIMIT,
    progress: Progress | None = None,
    download_progress: Progress | None = None,
) -> ImageSet:
    """Opens any image source as uint8 images (N, C, H, W), 0..255, with their labels.

    source: a name or a path, see ACCEPTED. A name wins over a file that is called the same (./digits is the file).
    size: images are cropped to the centre square and resized to size x size; None: all have one size already.
    channels: 3 for RGB, 1 for grey.
    split: "train" or "test". Digits and CIFAR have both; other sources only if their first level is train/, test/.
        What has no parts is opened as "train".
    cache: folder for downloads and memory maps; None: `files.cache_folder()`.
    memory_limit: bytes of decoded images above which they are memory-mapped instead of kept in memory.
    progress, download_progress: called with (images done, of how many) and (bytes done, of how many).

    Files are ordered by name. Raises InputError, in one line, for what can't be used: of files that can't be read the
    first is named and all are counted. Raises RunError for a failed download or a disk that can't be written.
    """
    if size is not None and size < 1:
        raise InputError(f"size {size} isn't accepted: a positive number of pixels, or none")
    if channels not in (1, 3):
        raise InputError(f"channels {channels} isn't accepted: 3 (RGB) or 1 (grey)")
    cache = cache_folder() if cache is None else cache
    name, found = find_images(source, split=split, cache=cache, download_progress=download_progress)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on odd metadata; what matters is raised
        images, pixels_sha256 = decode_all(
            found, size=size, channels=channels, cache=cache / "images", memory_limit=memory_limit, progress=progress
        )
    own = fingerprint(pixels_sha256, found.labels)
    return ImageSet(name, found.split, images, found.labels, found.class_names, own)


def find_images(
    source: str | Path, *, split: str = "train", cache: Path | None = None, download_progress: Progress | None = None
) -> tuple[str, Undecoded]:
    """The name for records, and the images of a source before they are decoded; arguments and errors as above."""
    if split not in SPLITS:
        raise InputError(f"split {split!r} isn't accepted: {' or '.join(SPLITS)}")
    cache = cache_folder() if cache is None else cache
    name = str(source)
    if name == "digits":
        found = digits(split)
    elif name in DOWNLOADS:
        found = cifar_archive(fetch(DOWNLOADS[name], cache / "downloads", download_progress), split)
    elif name.startswith(PREFIX):
        found = hub_dataset(name, split, show_progress=download_progress is not None)
        folder = Path(name.removeprefix(PREFIX).partition(":")[0])
        name = folder.resolve().name if folder.is_dir() else name
    else:
        found = _open_path(name, split)
        name = Path(name).resolve().name
    return name, found


def _open_path(source: str, split: str) -> Undecoded:
    path = Path(source)
    if path.is_dir():
        if (cifar := cifar_folder(path, split)) is not None:
            return cifar
        if is_saved_dataset(path):
            return saved_dataset(path, split)
        files = files_of_folder(path)
    else:
        start = _first_bytes(path)
        if start.startswith(b"\x93NUMPY"):
            _refuse_parts(path, split)
            return numpy_file(path)
        if start.startswith(b"\x1f\x8b"):
            return cifar_archive(path, split)
        if not start.startswith(b"PK"):
            raise InputError(f"{source!r} is a file of another kind; accepted: {ACCEPTED}")
        if path.suffix.lower() == ".npz":
            _refuse_parts(path, split)
            return numpy_archive(path)
        files = files_of_zip(path)
    if not files.names:
        raise InputError(f"{source!r} holds no image files ({' '.join(SUFFIXES)}); accepted: {ACCEPTED}")
    return of_split(files, split)


def _refuse_parts(path: Path, split: str) -> None:
    if split != "train":
        raise InputError(f"{path} has no split {split!r}, it is one set of images: give the path of the others")


def _first_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(f"{str(path)!r} is no file or folder here; accepted: {ACCEPTED}")
    try:
        with path.open("rb") as file:
            return file.read(8)
    except OSError as error:
        raise InputError(f"{str(path)!r} can't be read ({error.strerror})") from error


def open_images_together(
    source: str, accelerator: Accelerator, reading: Callable[[str, int, int], None], **kwargs: Any
) -> ImageSet:
    """The images on each process: read by one process of each machine first, then by the others.

    So a download or a memory map is made once a machine. What its processes decode into memory is limited together.

    Args:
        source: as for `open_images`, and so are the keyword arguments.
        accelerator: of the launch.
        reading: called on the main process with "images" or "bytes", how many are done, and of how many.

    Raises:
        InputError: as `open_images`; on all processes if on one.
    """
    if accelerator.is_main_process:
        kwargs |= {"progress": partial(reading, "images"), "download_progress": partial(reading, "bytes")}
    here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    kwargs = {"memory_limit": MEMORY_LIMIT // here, **kwargs}
    return first_on_each_machine(accelerator, lambda: open_images(source, **kwargs))
