"""Folders and zips of image files, and the classes and splits that folder names give."""

import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from dia_diffusion.data import decode
from dia_diffusion.data.decode import bounded, open_image, read_file, stamp_of
from dia_diffusion.data.image_set import ImageSource
from dia_diffusion.errors import InputError, one_line
from dia_diffusion.reading import refuse_bomb

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
SPLIT_FOLDERS = {"train", "test", "val", "valid", "validation"}


def files_of_folder(folder: Path) -> ImageSource:
    """The image files in a folder and its subfolders, ordered by name."""
    names = sorted(image_names(folder))

    def read(index: int) -> bytes:
        return read_file(folder / names[index])

    return _files(str(folder), names, read, [stamp_of(folder / name) for name in names])


def image_names(folder: Path) -> Iterator[str]:
    """The paths of image files relative to a folder; hidden names are left out.

    Links are followed; a folder that is reached twice counts once, since a link to a parent would never end.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"folder {one_line(str(error.filename))} can't be listed ({error.strerror})")

    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        inside = Path(place).relative_to(folder).as_posix()
        prefix = "" if inside == "." else f"{inside}/"  # a Path per file takes as long as decoding a small image
        yield from filter(_is_image_name, (prefix + file for file in files))


def files_of_zip(path: Path) -> ImageSource:
    """The image files in a zip, read one at a time, never extracted; InputError for a malicious one."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise InputError(f"{path} can't be read as a zip ({one_line(str(error))}), it may be truncated") from error
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


def of_split(files: ImageSource, split: str) -> ImageSource:
    """The files of a split, labeled by their folders.

    The folders of the first level are the classes, if every image is in one and there are at least two. A single folder
    around everything is skipped. A first level of train, test or the like is the split.

    Raises:
        InputError: there are no images, or no such split.
    """
    if not files.names:
        raise InputError(f"{files.where!r} holds no image files ({' '.join(SUFFIXES)})")
    folders = [name.split("/")[:-1] for name in files.names]
    depth = 0
    while len(heads := _heads(folders, depth)) == 1:
        depth += 1
    chosen = list(range(len(folders)))
    has_parts = "train" in heads and heads <= SPLIT_FOLDERS
    if has_parts:
        if split not in heads:
            raise InputError(f"`split` must be one of {', '.join(sorted(heads))} for {files.where}, got {split!r}")
        chosen = [i for i in chosen if folders[i][depth] == split]
        depth += 1
        heads = _heads([folders[i] for i in chosen], depth)
    elif split != "train":
        raise InputError(f"`split` must be train for {files.where}, which has no splits, got {split!r}")
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


def _files(where: str, names: list[str], read: Callable[[int], bytes], stamps: list[tuple[int, int]]) -> ImageSource:
    return ImageSource(where, names, lambda index: open_image(read(index)), stamps)


def _heads(folders: list[list[str]], depth: int) -> set[str]:
    """The folder names at this depth; none if there is also an image."""
    return set() if any(len(parts) <= depth for parts in folders) else {parts[depth] for parts in folders}


def _is_image_name(name: str) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    return not hidden and name.lower().endswith(SUFFIXES)


def _name(entry: zipfile.ZipInfo) -> str:
    return entry.filename.replace("\\", "/")  # as some Windows programs write


def _harm(entry: zipfile.ZipInfo) -> str | None:
    name = _name(entry)
    if name.startswith("/") or name[1:2] == ":" or ".." in name.split("/"):
        return "points outside of the archive"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "is a link"
    if not _is_image_name(name):
        return None  # never read
    if entry.file_size > decode.FILE_LIMIT:
        return f"must have at most {decode.FILE_LIMIT >> 20} MiB"
    return None
