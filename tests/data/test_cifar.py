import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dia_diffusion.data import arrays, open_images
from dia_diffusion.data.arrays import PickledArray, load_arrays
from dia_diffusion.errors import InputError
from tests.data.conftest import write_folder

NAMES = {10: [f"class{k}" for k in range(10)], 100: [f"fine{k}" for k in range(100)]}
rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)  # two per training file, one for test
LABELS = {10: rng.integers(0, 10, 11).tolist(), 100: rng.integers(0, 100, 11).tolist()}
PARTS = {10: [slice(k, k + 2) for k in range(0, 10, 2)], 100: [slice(0, 10)]}


def planes(images: np.ndarray) -> bytes:
    """Row-major red, then green, then blue, one image after the other."""
    return b"".join(images[i, :, :, c].tobytes() for i in range(len(images)) for c in range(3))


def binary_file(num_classes: int, part: slice) -> bytes:
    coarse = b"\x13" if num_classes == 100 else b""
    pairs = zip(IMAGES[part], LABELS[num_classes][part], strict=True)
    return b"".join(coarse + bytes([label]) + planes(image[None]) for image, label in pairs)


def binary(num_classes: int) -> dict[str, bytes]:
    train = [binary_file(num_classes, part) for part in PARTS[num_classes]]
    test = binary_file(num_classes, slice(10, 11))
    names = "\n".join([*NAMES[num_classes], ""]).encode()
    if num_classes == 100:
        return {
            "train.bin": train[0],
            "test.bin": test,
            "fine_label_names.txt": names,
            "coarse_label_names.txt": b"x\n",
        }
    files = {f"data_batch_{k}.bin": data for k, data in enumerate(train, 1)}
    return files | {"test_batch.bin": test, "batches.meta.txt": names + b"\n", "readme.html": b"<html>"}


def python_2_pickle(array: np.ndarray, key: str, labels: list[int]) -> bytes:
    """What Python 2 wrote for {"data": array, key: labels}, in protocol 2."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n(" + text("u1") + b"K\x00K\x01tR(K\x03" + text("|") + b"NNN" + number(-1) * 2 + b"K\x00tb"
    shape = b"(" + b"".join(map(number, array.shape)) + b"t"
    raw = b"T" + struct.pack("<i", array.nbytes) + array.tobytes()
    rebuilt = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text("b") + b"tR"
    state = b"(K\x01" + shape + dtype + b"\x89" + raw + b"tb"
    items = text("data") + rebuilt + state + text(key) + b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + items + b"u."


def python(num_classes: int, dump: Callable[[np.ndarray, str, list[int]], bytes] = python_2_pickle) -> dict[str, bytes]:
    fine = "fine_" if num_classes == 100 else ""

    def batch(part: slice) -> bytes:
        rows = np.frombuffer(planes(IMAGES[part]), dtype=np.uint8).reshape(-1, 3072)
        return dump(rows, f"{fine}labels", LABELS[num_classes][part])

    train = [batch(part) for part in PARTS[num_classes]]
    meta = pickle.dumps({f"{fine}label_names".encode(): [name.encode() for name in NAMES[num_classes]]}, protocol=2)
    if num_classes == 100:
        return {"train": train[0], "test": batch(slice(10, 11)), "meta": meta, "file.txt~": b""}
    files = {f"data_batch_{k}": data for k, data in enumerate(train, 1)}
    return files | {"test_batch": batch(slice(10, 11)), "batches.meta": meta, "readme.html": b"<html>"}


LAYOUTS = {
    "cifar-10-batches-bin": (10, binary),
    "cifar-10-batches-py": (10, python),
    "cifar-100-binary": (100, binary),
    "cifar-100-python": (100, python),
}


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def check(source: Path, num_classes: int) -> None:
    train, test = open_images(source), open_images(source, split="test")
    assert (train.split, test.split) == ("train", "test")
    np.testing.assert_array_equal(train.images.transpose(0, 2, 3, 1), IMAGES[:10])
    np.testing.assert_array_equal(test.images.transpose(0, 2, 3, 1), IMAGES[10:])
    assert train.labels is not None and train.labels.tolist() == LABELS[num_classes][:10]
    assert test.labels is not None and test.labels.tolist() == LABELS[num_classes][10:]
    assert train.class_names == tuple(NAMES[num_classes])
    assert train.images.flags.c_contiguous and train.labels.dtype == np.int64


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_archive_as_folder_and_as_tar(tmp_path, layout):
    num_classes, make = LAYOUTS[layout]
    folder = write_folder(tmp_path / layout, make(num_classes))
    check(folder, num_classes)
    check(tmp_path, num_classes)
    check(write_tar(tmp_path / "x.tar.gz", {f"{layout}/{n}": d for n, d in make(num_classes).items()}), num_classes)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_arrays_of_every_protocol(protocol, order, module):
    array = np.asarray(IMAGES[:2, 0, :, 0], order=order)
    data = pickle.dumps({"data": array, b"data": [1, "x", None]}, protocol=protocol)
    if protocol < 4:  # there, names are stored without a length
        data = data.replace(b"numpy._core", module.encode()).replace(b"numpy.core", module.encode())
    loaded = load_arrays(data)
    assert isinstance(loaded["data"], PickledArray) and loaded[b"data"] == [1, "x", None]
    np.testing.assert_array_equal(loaded["data"].pixels, array)


class Run:
    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("call", [os.system, eval, print, np.load, np.zeros, getattr, pickle.loads])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_calls_something_is_refused(tmp_path, capsys, call, protocol):
    evil = pickle.dumps({"data": Run(call, "touch evil")}, protocol=protocol)
    with pytest.raises(pickle.UnpicklingError, match="only arrays of bytes are admitted"):
        load_arrays(evil)
    source = write_folder(tmp_path / "cifar-100-python", python(100) | {"train": evil})
    with pytest.raises(InputError, match=r"train is not a part of cifar-100-python .*only arrays of bytes") as error:
        open_images(source)
    assert "\n" not in str(error.value) and capsys.readouterr().out == "" and not Path("evil").exists()


@pytest.mark.parametrize(
    "array", [np.array([print]), np.zeros(3), np.zeros(2, dtype=[("a", "u1"), ("b", "O")]), np.zeros(2, dtype=">u2")]
)
def test_arrays_of_anything_but_bytes_are_refused(array):
    with pytest.raises(Exception, match=r"uint8|only arrays of bytes|unpack"):
        load_arrays(pickle.dumps(array, protocol=2))


def test_an_array_that_is_larger_than_its_data_is_refused():
    with pytest.raises(ValueError, match="reshape"):
        load_arrays(python_2_pickle(IMAGES[0, 0], "x", []).replace(b"J\x20\x00\x00\x00", b"J\x00\x00\x00\x7f"))


GOOD = {"binary": binary(10), "python": python(10)}


def refused(source: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        open_images(source)
    assert "\n" not in str(error.value) and str(source) in str(error.value)


@pytest.mark.parametrize(
    ("kind", "name", "data", "message"),
    [
        ("binary", "data_batch_3.bin", None, "an incomplete cifar-10-batches-bin: data_batch_3.bin is missing"),
        ("binary", "data_batch_3.bin", b"", "data_batch_3.bin is not a part .*whole records.* got 0 bytes"),
        (
            "binary",
            "data_batch_3.bin",
            GOOD["binary"]["data_batch_3.bin"][:-1],
            "must hold whole records of 3073 bytes",
        ),
        ("binary", "data_batch_3.bin", b"\x0a" + bytes(3072), "labels must be in 0..9"),
        ("binary", "batches.meta.txt", b"cat\ndog\n", "must have 10 class names, got 2"),
        ("binary", "batches.meta.txt", b"\xff\xfe", "can't be read"),
        ("python", "data_batch_2", None, "data_batch_2 is missing"),
        ("python", "data_batch_2", b"", "data_batch_2 is not a part"),
        ("python", "data_batch_2", GOOD["python"]["data_batch_2"][:-900], "data_batch_2 is not a part"),
        ("python", "data_batch_2", pickle.dumps([1]), "not a dict"),
        ("python", "data_batch_2", pickle.dumps({"labels": [1]}), "data_batch_2 is not a part"),
        ("python", "data_batch_2", pickle.dumps({"data": [1], "labels": [1]}), "must be one row of 3072"),
        ("python", "data_batch_2", python_2_pickle(IMAGES[:, 0, :, 0], "labels", [1]), "must be one row of 3072"),
        (
            "python",
            "data_batch_2",
            python_2_pickle(np.zeros((1, 3072), np.uint8), "labels", [-1]),
            "labels must be in 0..9",
        ),
        ("python", "batches.meta", pickle.dumps({}), "batches.meta can't be read"),
    ],
)
def test_damaged_archives_are_refused(tmp_path, kind, name, data, message):
    files = {other: content for other, content in GOOD[kind].items() if other != name}
    files |= {} if data is None else {name: data}
    for source in (write_folder(tmp_path / "folder", files), write_tar(tmp_path / "x.tar.gz", files)):
        refused(source, message)


def test_without_the_file_of_names_there_are_none(tmp_path):
    files = {name: data for name, data in binary(10).items() if name.endswith(".bin")}
    assert open_images(write_folder(tmp_path / "x", files)).class_names is None


def test_other_and_broken_tars_are_refused(tmp_path):
    refused(write_tar(tmp_path / "other.tar.gz", {"a/1.png": b""}), "got a tar.gz without its train files")
    whole = write_tar(tmp_path / "cut.tar.gz", binary(10))
    whole.write_bytes(whole.read_bytes()[:-5000])
    refused(whole, "can't be read as a tar.gz archive")
    (tmp_path / "x.gz").write_bytes(b"\x1f\x8bnothing")
    refused(tmp_path / "x.gz", "can't be read as a tar.gz archive")


def test_tar_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "BYTES_LIMIT", 1 << 20)
    small = {f"{k}": bytes(1 << 18) for k in range(9)}
    refused(write_tar(tmp_path / "many.tar.gz", small), "unpacks to more than 1048576 bytes")
    refused(write_tar(tmp_path / "large.tar.gz", {"train.bin": bytes(1 << 21)}), "train.bin declares more than")
    refused(write_folder(tmp_path / "folder", {"train.bin": bytes(1 << 21)}), "got more than")
