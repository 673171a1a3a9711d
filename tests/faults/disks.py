"""Small and read-only disks: a folder's mode isn't enough, since root may write to any folder."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _mount(*arguments: object) -> None:
    try:
        subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("nothing can be mounted here: there is no mount")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"nothing can be mounted here: {error.stderr.strip()}")


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """An in-memory disk of this size, such as "1m"."""
    place.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", place)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """A read-only mount of the folder, next to it."""
    place = folder.with_name(f"{folder.name} read-only")
    place.mkdir()
    _mount("--bind", folder, place)
    try:
        _mount("-o", "remount,bind,ro", place)
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Fills a disk with one file except for `leave` bytes; returns the file."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
        file.truncate(max(0, file.tell() - leave))
    return filler
