"""Zips, numpy files and tars that point outside themselves, decompress without end or hold things other than images."""

import gzip
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dia_diffusion.data import open_images
from tests.security import hostile, hostile_images
from tests.security.hostile import npy_of, write_bomb, write_overlapping, write_zip
from tests.security.watch import Sandbox

NAMES = {
    "up": "../b.png",
    "up within": "a/../../b.png",
    "absolute": "/tmp/b.png",
    "backslashes": "..\\..\\b.png",
    "drive": "C:\\b.png",
    "drive alone": "C:b.png",
    "share": "\\\\server\\b.png",
    "escapes": "../\x1b[2J\x07.png",
    "not an image": "../../.ssh/authorized_keys",
}


@pytest.mark.parametrize("name", NAMES)
def test_zip_entries_outside_of_the_archive(name: str, sandbox: Sandbox) -> None:
    given = write_zip(sandbox.folder / "x.zip", {"a.png": hostile_images.png(), NAMES[name]: hostile_images.png()})
    sandbox.refused(lambda: open_images(given), given, "points outside of the archive")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR], ids=["link", "pipe", "device"])
def test_zip_entries_that_are_no_files_are_never_made(kind: int, sandbox: Sandbox) -> None:
    entry = zipfile.ZipInfo("a.png")
    entry.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(sandbox.folder / "x.zip", "w") as archive:
        archive.writestr(entry, str(sandbox.secret))
    named = ["a.png is a link"] if kind == stat.S_IFLNK else ["a.png"]
    sandbox.refused(lambda: open_images(sandbox.folder / "x.zip"), "x.zip", *named)


def test_zip_bombs(sandbox: Sandbox) -> None:
    given = write_bomb(sandbox.folder / "x.zip", "a.png", 1 << 28)
    sandbox.refused(lambda: open_images(given), "compressed more than 200 times")
    given = write_bomb(sandbox.folder / "y.zip", "a.png", 1 << 28, lie=1 << 27)
    sandbox.refused(lambda: open_images(given), "y.zip")
    inner = write_bomb(sandbox.folder / "z.zip", "a.png", 1 << 28).read_bytes()
    sandbox.refused(lambda: open_images(write_zip(sandbox.folder / "nested.zip", {"a.zip": inner})), "no image files")


def test_entries_over_each_other(sandbox: Sandbox) -> None:
    given = write_overlapping(sandbox.folder / "x.zip", "{:04d}.png", hostile_images.png((64, 64)), 2000)
    sandbox.refused(lambda: open_images(given), given)


def test_a_zip_of_many_empty_entries(sandbox: Sandbox) -> None:
    given = write_zip(sandbox.folder / "x.zip", {f"{k}.png": b"" for k in range(5000)})
    sandbox.refused(lambda: open_images(given), "5000 of 5000 images can't be read")


ARRAYS: dict[str, Callable[[Path], bytes]] = {
    **hostile.ARRAYS,
    "shape of gigabytes": lambda _: npy_of("(1000000, 1000, 1000, 3)"),
    "shape of 2^70": lambda _: npy_of(f"({1 << 70}, 1, 1, 3)"),
    "shape overflows": lambda _: npy_of(f"({1 << 32}, {1 << 32}, 1, 3)"),
    "negative shape": lambda _: npy_of("(-1, 8, 8, 3)"),
    "shape of digits": lambda _: npy_of(f"({'9' * 90}, 1)"),
    "shape of text": lambda _: npy_of("'abc'"),
    "shape of code": lambda _: npy_of("(__import__('os').getpid(), 1)"),
    "objects' type": lambda _: npy_of("(2,)", "'|O'"),
    "records": lambda _: npy_of("(2,)", "[('a', '|O')]"),
    "unknown type": lambda _: npy_of("(2,)", "'|z9'"),
    "header of nothing": lambda _: hostile.npy_header(""),
    "no more keys": lambda _: hostile.npy_header("{'descr': '|u1'}"),
    "header of 60,000 bytes": lambda _: b"\x93NUMPY\x01\x00" + struct.pack("<H", 60000) + b"(" * 60000,
    "header of 4 GB": lambda _: b"\x93NUMPY\x02\x00" + struct.pack("<I", 0xFFFFFFF0) + b"{",
    "version 9": lambda _: b"\x93NUMPY\x09\x00" + bytes(100),
    "floats": lambda _: hostile.npy(np.zeros((2, 8, 8, 3))),
    "no images": lambda _: hostile.npy(np.zeros((0, 8, 8, 3), np.uint8)),
    "no pixels": lambda _: hostile.npy(np.zeros((2, 0, 8, 3), np.uint8)),
    "cut short": lambda _: hostile.npy(np.zeros((2, 8, 8, 3), np.uint8))[:-50],
    "signature": lambda _: b"\x93NUMPY",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("place", ["npy", "npz"])
def test_hostile_arrays(kind: str, place: str, sandbox: Sandbox) -> None:
    data, given = ARRAYS[kind](sandbox.marker), sandbox.folder / f"x.{place}"
    if place == "npy":
        given.write_bytes(data)
    else:
        write_zip(given, {"images.npy": data})
    sandbox.refused(lambda: open_images(given), given)


def test_array_bombs(sandbox: Sandbox) -> None:
    start = npy_of(f"({1 << 14}, 32, 32, 1)", data=b"")
    given = write_bomb(sandbox.folder / "x.npz", "images.npy", 1 << 24, start)
    sandbox.refused(lambda: open_images(given), given, "compressed more than 200 times")
    given = write_bomb(sandbox.folder / "y.npz", "images.npy", 1 << 24, start, lie=1 << 23)
    sandbox.refused(lambda: open_images(given), given, "declare")
    images = hostile.npy(np.zeros((2, 8, 8, 3), np.uint8))
    for name, labels in {"many": np.array([0, 1 << 62]), "negative": np.array([-1, 0]), "nan": np.zeros(2)}.items():
        given = write_zip(sandbox.folder / f"{name}.npz", {"images.npy": images, "labels.npy": hostile.npy(labels)})
        sandbox.refused(lambda given=given: open_images(given), given)


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


TAR_MEMBERS = {
    "up": member("../data_batch_1"),
    "absolute": member("/tmp/data_batch_1"),
    "link": member("data_batch_1", tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": member("data_batch_1", tarfile.LNKTYPE, "../../etc/passwd"),
    "pipe": member("data_batch_1", tarfile.FIFOTYPE),
    "device": member("data_batch_1", tarfile.CHRTYPE),
    "folder": member("data_batch_1", tarfile.DIRTYPE),
    "escapes": member("../\x1b[2J/data_batch_1"),
}


@pytest.mark.parametrize("kind", TAR_MEMBERS)
def test_tar_members_that_are_no_files_within(kind: str, sandbox: Sandbox) -> None:
    given = sandbox.folder / "cifar-10-python.tar.gz"
    with tarfile.open(given, "w:gz") as archive:
        archive.addfile(TAR_MEMBERS[kind])
    sandbox.refused(lambda: open_images(given), given)


def test_tar_bombs(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dia_diffusion.data.arrays.BYTES_LIMIT", 1 << 24)
    given = sandbox.folder / "x.tar.gz"
    for name in ("data_batch_1", "other"):
        header = member(name)
        header.size = 1 << 26
        with gzip.open(given, "wb", compresslevel=1) as file:
            file.write(header.tobuf() + bytes(1 << 26))
        sandbox.refused(lambda: open_images(given), given, "declares more than")
