"""Images that come as uint8 arrays: numpy files, scikit-learn's digits, and CIFAR as its authors publish it."""

import gzip
import io
import pickle
import pickletools
import tarfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dia_diffusion.data.decode import Pixels
from dia_diffusion.data.image_set import ImageSource, Labels, array_source
from dia_diffusion.errors import InputError, one_line
from dia_diffusion.reading import refuse_bomb

CLASS_LIMIT = 1 << 16  # each class up to the highest gets a name, and later an embedding


def numpy_file(path: Path) -> ImageSource:
    """A .npy file of uint8 (N, H, W, C) with 1 to 4 channels, or (N, H, W), as a memory map."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy evaluates the header as Python literals, which can raise many types
        raise InputError(f"{path} can't be read as a numpy file ({one_line(str(error))})") from error
    return array_source(str(path), _pixels(images, path))


def numpy_archive(path: Path) -> ImageSource:
    """A .npz file: uint8 `images` as `sample` writes them, or `arr_0` as ADM does, (N, H, W, C) or (N, H, W).

    Class numbers (N,) may come as `labels` or `arr_1`.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            refuse_bomb(archive.zip, path)
            images_name = next((name for name in ("images", "arr_0") if name in archive.files), None)
            labels_name = next((name for name in ("labels", "arr_1") if name in archive.files), None)
            if images_name is None:
                if {"mu", "sigma"} & set(archive.files):  # also in ADM's archives of images
                    raise InputError(f"{path} must hold images, got statistics (mu, sigma)")
                holds = one_line(", ".join(archive.files)) or "nothing"
                raise InputError(f"{path} must hold images or arr_0, got {holds}")
            images = archive[images_name]
            labels = None if labels_name is None else archive[labels_name]
            if isinstance(images, bytes) or isinstance(labels, bytes):  # numpy's result if an entry isn't .npy
                raise ValueError("its entries are not arrays")
    except InputError:
        raise
    except Exception as error:  # as above, and for object arrays, which only unpickling could read
        raise InputError(f"{path} can't be read as an .npz file ({one_line(str(error))})") from error
    pixels = _pixels(images, path)
    if labels is None:
        return array_source(str(path), pixels)
    if labels.dtype.kind not in "iu" or labels.shape != (len(pixels),) or labels.min() < 0:
        raise InputError(
            f"`{labels_name}` of {path} must be a class number per image, got {labels.dtype} {labels.shape}"
        )
    if labels.max() >= CLASS_LIMIT:
        raise InputError(f"`{labels_name}` of {path} must be below {CLASS_LIMIT:,}, got {labels.max()}")
    class_names = tuple(str(number) for number in range(int(labels.max()) + 1))
    return array_source(str(path), pixels, labels.astype(np.int64), class_names)


def _pixels(images: np.ndarray, path: Path) -> Pixels:
    """Images (N, H, W, C); InputError for other arrays."""
    pixels = images[:, :, :, None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or pixels.ndim != 4 or not 1 <= pixels.shape[3] <= 4 or 0 in pixels.shape:
        expected = "uint8 (N, H, W, C) with 1 to 4 channels, or (N, H, W)"
        raise InputError(f"{path} must hold {expected}, got {images.dtype} {images.shape}")
    return pixels


def digits(split: str) -> ImageSource:
    """scikit-learn's 1797 handwritten digits, 8 x 8 gray, with values 0..16 scaled to 0..255.

    Every third image of each class, in the order of the data set, is in split "test"; the others are in "train".
    """
    from sklearn.datasets import load_digits  # slow to import, and needed only here

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, :, :, None]
    labels = data.target.astype(np.int64)
    rank_in_class = np.zeros_like(labels)
    for digit in range(10):
        rank_in_class[labels == digit] = np.arange(np.sum(labels == digit))
    chosen = (rank_in_class % 3 == 2) == (split == "test")
    class_names = tuple(str(digit) for digit in range(10))
    return replace(array_source("digits", images[chosen], labels[chosen], class_names, split), name="digits")


class PickledArray:
    """Stands in for a numpy array; `pixels` is the array once its state has been read."""

    pixels: Pixels

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.pixels = _array(raw, dtype, shape, "F" if is_fortran else "C")


class _PickledDtype:
    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: Any) -> None:
        """Ignores byte order and alignment, which don't matter for bytes."""


def _array(raw: Any, dtype: Any, shape: Any, order: Any) -> Pixels:
    if not isinstance(dtype, _PickledDtype) or dtype.code not in ("u1", "|u1", "uint8"):
        raise pickle.UnpicklingError("holds an array of another type than uint8")
    return np.frombuffer(raw, dtype=np.uint8).reshape(shape, order="F" if order == "F" else "C")


def _reconstruct(*_: Any) -> PickledArray:
    return PickledArray()


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
    array = PickledArray()
    array.pixels = _array(raw, dtype, shape, order)
    return array


def _encode(text: str, _: Any) -> bytes:
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): "numpy.ndarray",  # only passed to _reconstruct
    ("numpy", "dtype"): _PickledDtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,  # numpy 2
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,  # protocol 5
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,  # bytes, as Python 3 writes them in protocol 2
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"names {module}.{name}; only arrays of bytes are admitted")
        return _ADMITTED[module, name]


def load_arrays(data: bytes) -> Any:
    """The pickled value, with text of Python 2 as bytes and arrays as PickledArray.

    Raises pickle.UnpicklingError for anything else that needs code, and any error of pickle for broken data.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(data):
            # pickle allocates memory for all numbers below it: a few bytes could take gigabytes.
            raise pickle.UnpicklingError(f"has memo index {argument:,} in {len(data):,} bytes")
    return _Unpickler(io.BytesIO(data), encoding="bytes").load()


BYTES_LIMIT = 1 << 29
"""Bytes of an archive after decompression; the real ones hold less than 190 million."""
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Layout:
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    num_classes: int

    @property
    def is_binary(self) -> bool:
        return self.train[0].endswith(".bin")

    def files(self, split: str) -> tuple[str, ...]:
        return self.train if split == "train" else self.test


_LAYOUTS = (
    _Layout(
        "cifar-10-batches-bin",
        tuple(f"data_batch_{k}.bin" for k in range(1, 6)),
        ("test_batch.bin",),
        "batches.meta.txt",
        10,
    ),
    _Layout("cifar-10-batches-py", tuple(f"data_batch_{k}" for k in range(1, 6)), ("test_batch",), "batches.meta", 10),
    _Layout("cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt", 100),
    _Layout("cifar-100-python", ("train",), ("test",), "meta", 100),
)
FOLDERS = tuple(layout.folder for layout in _LAYOUTS)


def is_cifar_folder(folder: Path) -> bool:
    """Whether it is an extracted archive, or a folder that contains one."""
    return _find(folder) is not None


def cifar_folder(folder: Path, split: str) -> ImageSource:
    """The images of an extracted archive, or of the one inside this folder."""
    found = _find(folder)
    assert found is not None
    layout, place = found
    wanted = (*layout.files(split), layout.names)
    files = {name: _bytes_of(place / name) for name in wanted if (place / name).is_file()}
    return _parse(layout, files, split, str(place))


def _find(folder: Path) -> tuple[_Layout, Path] | None:
    for layout in _LAYOUTS:
        for place in (folder, folder / layout.folder):
            if any((place / name).is_file() for name in layout.train + layout.test):
                return layout, place
    return None


def cifar_archive(path: Path, split: str) -> ImageSource:
    """The images of a tar.gz archive, read in memory: nothing is extracted."""
    wanted = {name for layout in _LAYOUTS for name in (*layout.files(split), layout.names)}
    files: dict[str, bytes] = {}
    try:
        with _Limited(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or member.issym() or member.islnk():
                    raise ValueError(f"its member {one_line(member.name)} points outside of the archive or is a link")
                if member.size > BYTES_LIMIT:
                    raise ValueError(f"its member {one_line(member.name)} declares more than {BYTES_LIMIT} bytes")
                is_wanted = name.name in wanted and member.isreg() and not member.issparse()
                if is_wanted and (content := archive.extractfile(member)):
                    files[name.name] = content.read()
    except (tarfile.TarError, zlib.error, ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} can't be read as a tar.gz archive ({one_line(str(error))})") from error
    for layout in _LAYOUTS:
        if any(name in files for name in layout.files(split)):
            return _parse(layout, files, split, str(path))
    raise InputError(f"{path} must be a CIFAR archive ({', '.join(FOLDERS)}), got a tar.gz without its {split} files")


class _Limited(gzip.GzipFile):
    """Stops reading an archive that unpacks to more than BYTES_LIMIT."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > BYTES_LIMIT:
            raise ValueError(f"it unpacks to more than {BYTES_LIMIT} bytes")
        return super().read(size)


def _bytes_of(path: Path) -> bytes:
    try:
        if path.stat().st_size <= BYTES_LIMIT:
            return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror})") from error
    raise InputError(f"{path} must be a part of a CIFAR archive, got more than {BYTES_LIMIT} bytes")


def _parse(layout: _Layout, files: dict[str, bytes], split: str, where: str) -> ImageSource:
    parts = []
    for name in layout.files(split):
        if name not in files:
            raise InputError(f"{where} is an incomplete {layout.folder}: {name} is missing")
        try:
            parts.append((_binary if layout.is_binary else _python)(files[name], layout))
        except Exception as error:  # broken or hostile pickles can raise almost anything
            raise InputError(f"{where}: {name} is not a part of {layout.folder} ({one_line(str(error))})") from error
    images = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([numbers for _, numbers in parts])
    names = _class_names(layout, files.get(layout.names), where)
    return array_source(where, images.transpose(0, 2, 3, 1), labels, names, split)


def _binary(data: bytes, layout: _Layout) -> tuple[Pixels, Labels]:
    """Records of label bytes, the class last, and 3072 bytes of pixels, plane by plane."""
    num_labels = 2 if layout.num_classes == 100 else 1
    if not data or len(data) % (num_labels + _PIXELS):
        raise ValueError(f"must hold whole records of {num_labels + _PIXELS} bytes, got {len(data)} bytes")
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, num_labels + _PIXELS)
    return records[:, num_labels:], _checked(records[:, num_labels - 1].astype(np.int64), layout)


def _python(data: bytes, layout: _Layout) -> tuple[Pixels, Labels]:
    """A pickled dict with `data`, uint8 (N, 3072), and a list of labels."""
    batch = _text_keys(load_arrays(data))
    array, labels = batch["data"], batch["fine_labels" if layout.num_classes == 100 else "labels"]
    if not isinstance(array, PickledArray) or array.pixels.shape != (len(labels), _PIXELS):
        raise ValueError(f"its data must be one row of {_PIXELS} per label")
    return array.pixels, _checked(np.array(labels, dtype=np.int64), layout)


def _checked(labels: Labels, layout: _Layout) -> Labels:
    if len(labels) and not 0 <= labels.min() <= labels.max() < layout.num_classes:
        raise ValueError(f"labels must be in 0..{layout.num_classes - 1}")
    return labels


def _class_names(layout: _Layout, data: bytes | None, where: str) -> tuple[str, ...] | None:
    if data is None:
        return None
    try:
        if layout.is_binary:
            names = tuple(data.decode().split())
        else:
            found = _text_keys(load_arrays(data))["fine_label_names" if layout.num_classes == 100 else "label_names"]
            names = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in found)
    except Exception as error:  # as above
        raise InputError(f"{where}: {layout.names} can't be read ({one_line(str(error))})") from error
    if len(names) != layout.num_classes:
        raise InputError(f"{where}: {layout.names} must have {layout.num_classes} class names, got {len(names)}")
    return names


def _text_keys(batch: object) -> dict[str, Any]:
    if not isinstance(batch, dict):
        raise ValueError("not a dict")
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in batch.items()}
