"""Images from untrusted sources: malicious images, folders, pickled batches and saved datasets."""

import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dia_diffusion.data import open_images, read_image
from tests.data.test_cifar import python
from tests.security import hostile, hostile_images
from tests.security.hostile import write_zip
from tests.security.watch import Sandbox

IMAGES = hostile_images.images()


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


def test_bombs_in_metadata_chunks_are_not_decompressed(sandbox: Sandbox) -> None:
    """Pillow's own limit on the decompressed size of a text chunk, which an application may lift, is in force here."""
    text = hostile_images.chunk(b"zTXt", b"Comment\0\0" + hostile_images.zeros(1 << 28))
    sandbox.survived(lambda: read_image(hostile_images.png_of(8, 8, data=bytes(72), extra=text * 3), "dog.png"))


def image_folder(folder: Path) -> Path:
    given = folder / "images"
    given.mkdir()
    (given / "a.png").write_bytes(hostile_images.png())
    return given


def test_a_link_to_a_secret_is_refused_without_showing_its_content(sandbox: Sandbox) -> None:
    """Links in folders are the user's own: they are followed, and the error for a non-image gives only its name."""
    given = image_folder(sandbox.folder)
    other = sandbox.folder / "other.txt"
    other.write_text("password")
    (given / "b.png").symlink_to(other)
    message = sandbox.refused(lambda: open_images(given), "b.png")
    assert "password" not in message


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
@pytest.mark.parametrize("opened", [open_images, lambda given: open_images(given, decode=False).read([0, 1], both)])
def test_files_in_a_folder_that_are_no_images(make: Any, opened: Callable, sandbox: Sandbox) -> None:
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
    (place / "b.png").write_bytes(hostile_images.png())
    assert len(sandbox.watch(lambda: open_images(given))) == 2


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
    if isinstance(files, list) and files and isinstance(files[0], str):
        files = [{"filename": name} for name in files]
    hostile.change_json(given / "state.json", _data_files=files)
    sandbox.refused(lambda: open_images(given), given)


def test_a_datasets_script_is_not_run(sandbox: Sandbox) -> None:
    given = sandbox.folder / "scripted"
    given.mkdir()
    script = f"import os\nos.system('touch {sandbox.marker}')\n"
    for name in ("scripted.py", "dataset.py", "__init__.py"):
        (given / name).write_text(script)
    sandbox.survived(lambda: open_images(f"hf:{given}"))
    sandbox.refused(lambda: open_images(given), given)
