"""Images from anywhere: pictures, folders, zips, arrays, archives and saved datasets that were made to do harm."""

import gzip
import io
import json
import os
import pickle
import shutil
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dia_diffusion.data import open_images, read_image
from dia_diffusion.data.encoded import gather, open_encoded
from tests.data.test_cifar import python
from tests.security import hostile
from tests.security.hostile import npy_of, write_bomb, write_overlapping, write_zip
from tests.security.watch import Sandbox

IMAGES = hostile.images()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:Truncated File Read")
@pytest.mark.parametrize(
    ("place", "kind"),
    [
        *(("alone", kind) for kind in IMAGES),
        *((place, kind) for place in ("folder", "zip") for kind in IMAGES if len(IMAGES[kind]) < 1 << 18),
    ],
)
def test_hostile_images_are_refused(kind: str, place: str, sandbox: Sandbox) -> None:
    if place == "alone":
        sandbox.refused(lambda: read_image(IMAGES[kind], "dog.png", size=8), "dog.png")
        return
    given = sandbox.folder / "images"
    if place == "folder":
        given.mkdir()
        (given / "dog.png").write_bytes(IMAGES[kind])
    else:
        write_zip(given.with_suffix(".zip"), {"dog.png": IMAGES[kind]})
        given = given.with_suffix(".zip")
    sandbox.refused(lambda: open_images(given, size=8), given, "dog.png")


def test_bombs_in_what_surrounds_the_pixels_are_not_unpacked(sandbox: Sandbox) -> None:
    """Pillow's own limits, which an application may lift: here for what the first chunk of a text may hold."""
    text = hostile.chunk(b"zTXt", b"Comment\0\0" + hostile.zeros(1 << 28))
    sandbox.survived(lambda: read_image(hostile.png_of(8, 8, data=bytes(72), extra=text * 3), "dog.png"))


def test_several_frames_are_one(sandbox: Sandbox) -> None:
    from PIL import Image

    frames = [Image.new("P", (8, 8), k) for k in range(200)]
    data = hostile.encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert sandbox.watch(lambda: read_image(data, "dog.png")).shape == (8, 8, 3)


def image_folder(folder: Path) -> Path:
    given = folder / "images"
    given.mkdir()
    (given / "a.png").write_bytes(hostile.png())
    return given


def test_a_link_to_a_picture_elsewhere_is_followed_and_to_a_secret_told(sandbox: Sandbox) -> None:
    """Links in folders are a person's own: they are followed, and what is no image is told by its name alone."""
    given = image_folder(sandbox.folder)
    other = sandbox.folder / "other.txt"
    other.write_text("password")
    (given / "b.png").symlink_to(other)
    told = sandbox.refused(lambda: open_images(given), "b.png")
    assert "password" not in told


@pytest.mark.parametrize(
    "make",
    {
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "random": lambda path: path.symlink_to("/dev/urandom"),
        "endless link": lambda path: path.symlink_to(path.name),
        "link to nothing": lambda path: path.symlink_to("/nowhere"),
        "gigabytes": hostile.put_sparse,
        "escape in name": lambda path: path.with_name("b\x1b[2J\x07\n.png").write_bytes(b"x"),
        "no UTF-8 in name": lambda path: Path(os.fsdecode(bytes(path.parent) + b"/b\xff.png")).write_bytes(b"x"),
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("opened", [open_images, lambda given: gather(open_encoded(given).start(np.arange(2), both))])
def test_what_is_no_picture_in_a_folder(make: Any, opened: Callable, sandbox: Sandbox) -> None:
    given = image_folder(sandbox.folder)
    make[1](given / "b.png")
    sandbox.refused(lambda: opened(given), "images/b")


def both(_: int, image: Any) -> np.ndarray:
    return np.asarray(image)


@pytest.mark.parametrize("depth", [400])
def test_a_folder_in_a_folder_in_a_folder(depth: int, sandbox: Sandbox) -> None:
    given = image_folder(sandbox.folder)
    place = given
    for _ in range(depth):
        place = place / "dddd"
    place.mkdir(parents=True)
    (place / "b.png").write_bytes(hostile.png())
    assert len(sandbox.watch(lambda: open_images(given))) == 2


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
    given = write_zip(sandbox.folder / "x.zip", {"a.png": hostile.png(), NAMES[name]: hostile.png()})
    sandbox.refused(lambda: open_images(given), given, "points outside of the archive")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR], ids=["link", "pipe", "device"])
def test_zip_entries_that_are_no_files_are_never_made(kind: int, sandbox: Sandbox) -> None:
    entry = zipfile.ZipInfo("a.png")
    entry.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(sandbox.folder / "x.zip", "w") as archive:
        archive.writestr(entry, str(sandbox.secret))
    sandbox.refused(lambda: open_images(sandbox.folder / "x.zip"), "x.zip", "a.png")


def test_zip_bombs(sandbox: Sandbox) -> None:
    given = write_bomb(sandbox.folder / "x.zip", "a.png", 1 << 28)
    sandbox.refused(lambda: open_images(given), "compressed more than 200 times")
    given = write_bomb(sandbox.folder / "y.zip", "a.png", 1 << 28, lie=1 << 27)
    sandbox.refused(lambda: open_images(given), "y.zip")
    inner = write_bomb(sandbox.folder / "z.zip", "a.png", 1 << 28).read_bytes()
    sandbox.refused(lambda: open_images(write_zip(sandbox.folder / "nested.zip", {"a.zip": inner})), "no image files")


def test_entries_over_each_other(sandbox: Sandbox) -> None:
    given = write_overlapping(sandbox.folder / "x.zip", "{:04d}.png", hostile.png((64, 64)), 2000)
    sandbox.refused(lambda: open_images(given), given)


def test_a_zip_of_many_empty_entries(sandbox: Sandbox) -> None:
    given = write_zip(sandbox.folder / "x.zip", {f"{k}.png": b"" for k in range(5000)})
    sandbox.refused(lambda: open_images(given), "5000 of 5000 images can't be read")


ARRAYS: dict[str, Callable[[Path], bytes]] = {
    "objects": lambda marker: hostile.npy(hostile.object_array(marker)),
    "pickle": hostile.pickled,
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
    "header of code": lambda _: hostile.npy_header("__import__('os').system('touch x')"),
    "header deep": lambda _: hostile.npy_header("(" * 100),
    "header of nothing": lambda _: hostile.npy_header(""),
    "no more keys": lambda _: hostile.npy_header("{'descr': '|u1'}"),
    "header of 60,000 bytes": lambda _: b"\x93NUMPY\x01\x00" + struct.pack("<H", 60000) + b"(" * 60000,
    "header of 4 GB": lambda _: b"\x93NUMPY\x02\x00" + struct.pack("<I", 0xFFFFFFF0) + b"{",
    "version 9": lambda _: b"\x93NUMPY\x09\x00" + bytes(100),
    "floats": lambda _: hostile.npy(np.zeros((2, 8, 8, 3))),
    "complex": lambda _: hostile.npy(np.zeros((2, 8, 8, 3), complex)),
    "texts": lambda _: hostile.npy(np.array(["a", "b"])),
    "no images": lambda _: hostile.npy(np.zeros((0, 8, 8, 3), np.uint8)),
    "no pixels": lambda _: hostile.npy(np.zeros((2, 0, 8, 3), np.uint8)),
    "one number": lambda _: hostile.npy(np.uint8(3)),
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
    start = npy_of(f"({1 << 18}, 32, 32, 1)", data=b"")
    given = write_bomb(sandbox.folder / "x.npz", "images.npy", 1 << 28, start)
    sandbox.refused(lambda: open_images(given), given, "compressed more than 200 times")
    given = write_bomb(sandbox.folder / "y.npz", "images.npy", 1 << 28, start, lie=1 << 27)
    sandbox.refused(lambda: open_images(given), given, "declare")
    images = hostile.npy(np.zeros((2, 8, 8, 3), np.uint8))
    for name, labels in {"many": np.array([0, 1 << 62]), "negative": np.array([-1, 0]), "nan": np.zeros(2)}.items():
        given = write_zip(sandbox.folder / f"{name}.npz", {"images.npy": images, "labels.npy": hostile.npy(labels)})
        sandbox.refused(lambda given=given: open_images(given), given)


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member, data in members:
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


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
    given = write_tar(sandbox.folder / "cifar-10-python.tar.gz", (TAR_MEMBERS[kind], b""))
    sandbox.refused(lambda: open_images(given), given)


def test_tar_bombs(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dia_diffusion.data.cifar.BYTES_LIMIT", 1 << 26)
    given = sandbox.folder / "x.tar.gz"
    block = bytes(1 << 24)
    with gzip.open(given, "wb", compresslevel=9) as file:
        header = member("data_batch_1")
        header.size = 1 << 28
        file.write(header.tobuf())
        for _ in range(16):
            file.write(block)
    sandbox.refused(lambda: open_images(given), given, "declares more than")
    with gzip.open(given, "wb", compresslevel=9) as file:
        header = member("other")
        header.size = 1 << 28
        file.write(header.tobuf())
        for _ in range(16):
            file.write(block)
    sandbox.refused(lambda: open_images(given), given)


BATCHES: dict[str, Callable[[Path], bytes]] = {
    "command": hostile.pickled,
    "command, protocol 0": lambda marker: hostile.pickled(marker, 0),
    "command, protocol 5": lambda marker: hostile.pickled(marker, 5),
    "objects": lambda marker: pickle.dumps({"data": hostile.object_array(marker), "labels": [1]}, protocol=2),
    "memo of some gigabytes": lambda _: b"\x80\x04K\x01r" + struct.pack("<I", 0x0A000000) + b".",
    "memo of gigabytes in digits": lambda _: b"I1\np200000000\n.",
    "memo of gigabytes": lambda _: b"\x80\x04K\x01r" + struct.pack("<I", 0xFFFFFFF0) + b".",
    "text of gigabytes": lambda _: b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.",
    "bytes of 2^63": lambda _: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 63) + b"x.",
    "byte array": lambda _: b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
    "frame of gigabytes": lambda _: b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.",
    "list within itself": lambda _: b"\x80\x02]q\x00h\x00a.",
    "deep": lambda _: b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "digits": lambda _: b"I" + b"9" * 100_000 + b"\n.",
    "persistent": lambda _: b"\x80\x02Pname\n.",
    "extension": lambda _: b"\x80\x02\x82\x01.",
    "shape of gigabytes": lambda _: pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0]}).replace(
        b"M\x00\x0c", b"M\xff\xff"
    ),
    "labels of digits": lambda _: pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10**5000]}),
    "labels nested": lambda _: pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [[0] * 9]}),
}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", ["train", "meta"])
def test_hostile_batches(kind: str, name: str, sandbox: Sandbox) -> None:
    given = sandbox.folder / "cifar-100-python"
    given.mkdir()
    for file, data in (python(100) | {name: BATCHES[kind](sandbox.marker)}).items():
        (given / file).write_bytes(data)
    sandbox.refused(lambda: open_images(given), given)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "gigabytes"])
def test_batches_that_are_no_files(kind: str, sandbox: Sandbox) -> None:
    given = sandbox.folder / "cifar-100-python"
    given.mkdir()
    hostile.put_json(given / "train", kind)
    sandbox.refused(lambda: open_images(given), given)


@pytest.mark.parametrize("kind", ["pipe", "device", "gigabytes"])
@pytest.mark.parametrize("name", ["x.zip", "x.npz", "x.npy", "x.tar.gz"])
def test_sources_that_are_no_files(name: str, kind: str, sandbox: Sandbox) -> None:
    hostile.put_json(sandbox.folder / name, kind)
    sandbox.refused(lambda: open_images(sandbox.folder / name), name)


@pytest.mark.parametrize(
    "source",
    ["https://example.com/a.zip", "s3://bucket/a", "file:///etc/passwd", "/etc/passwd", "\0", "a\x1b[2Jb", "~"],
)
def test_sources_that_are_no_paths(source: str, sandbox: Sandbox) -> None:
    sandbox.refused(lambda: open_images(source))


@pytest.fixture(scope="module")
def saved_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import datasets
    from PIL import Image

    folder = tmp_path_factory.mktemp("datasets") / "saved"
    rows = {"image": [Image.new("RGB", (8, 8), "red")] * 2, "label": [0, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("kind", [*hostile.JSON_TEXTS, "pipe", "folder", "device"])
@pytest.mark.parametrize("name", ["dataset_info.json", "state.json"])
def test_hostile_saved_datasets(name: str, kind: str, saved_dataset: Path, sandbox: Sandbox) -> None:
    given = Path(shutil.copytree(saved_dataset, sandbox.folder / "saved"))
    hostile.put_json(given / name, kind)
    sandbox.survived(lambda: open_images(given))


@pytest.mark.parametrize(
    "files",
    [["../../outside/secret.arrow"], ["/etc/passwd"], [{"filename": 3}], "text", [[]], [None]],
    ids=lambda files: str(files)[:20],
)
def test_a_saved_dataset_that_points_elsewhere(files: Any, saved_dataset: Path, sandbox: Sandbox) -> None:
    given = Path(shutil.copytree(saved_dataset, sandbox.folder / "saved"))
    about = json.loads((given / "state.json").read_text())
    if isinstance(files, list) and files and isinstance(files[0], str):
        files = [{"filename": name} for name in files]
    (given / "state.json").write_text(json.dumps({**about, "_data_files": files}))
    sandbox.refused(lambda: open_images(given), given)


def test_a_datasets_script_is_not_run(sandbox: Sandbox) -> None:
    given = sandbox.folder / "scripted"
    given.mkdir()
    script = f"import os\nos.system('touch {sandbox.marker}')\n"
    for name in ("scripted.py", "dataset.py", "__init__.py"):
        (given / name).write_text(script)
    sandbox.survived(lambda: open_images(f"hf:{given}"))
    sandbox.refused(lambda: open_images(given), given)
