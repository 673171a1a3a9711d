"""Images that come as one uint8 array: numpy files and scikit-learn's digits."""

import io
import pickle
import pickletools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dia_diffusion.data.decode import Pixels
from dia_diffusion.data.image_set import ImageSource, array_source
from dia_diffusion.errors import InputError, one_line
from dia_diffusion.reading import refuse_bomb

CLASS_LIMIT = 1 << 16  # each class up to the highest gets a name, and later an embedding


def numpy_file(path: Path) -> ImageSource:
    """A .npy file of uint8 (N, H, W, C) with 1 to 4 channels, or (N, H, W), as a memory map."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a broken header is evaluated as Python literals, and raises accordingly
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
                if {"mu", "sigma"} & set(archive.files):  # which ADM's archives of images have beside them
                    raise InputError(f"{path} must hold images, got statistics (mu, sigma)")
                holds = one_line(", ".join(archive.files)) or "nothing"
                raise InputError(f"{path} must hold images or arr_0, got {holds}")
            images = archive[images_name]
            labels = None if labels_name is None else archive[labels_name]
            if isinstance(images, bytes) or isinstance(labels, bytes):  # as numpy returns what isn't .npy
                raise ValueError("its entries are not arrays")
    except InputError:
        raise
    except Exception as error:  # as above; objects among them, which only unpickling could read
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
    """scikit-learn's 1797 handwritten digits, 8 x 8 grey, their values 0..16 scaled to 0..255.

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
    """Takes the place of a numpy array; `pixels` is the array once its state has been read."""

    pixels: Pixels

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.pixels = _array(raw, dtype, shape, "F" if is_fortran else "C")


class _PickledDtype:
    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment mean nothing for bytes."""


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
    ("numpy", "ndarray"): "numpy.ndarray",  # only handed to _reconstruct
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

    Raises pickle.UnpicklingError for anything else that needs code, and whatever pickle raises for broken data.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(data):
            # pickle makes room for all numbers below it: a few bytes would take gigabytes.
            raise pickle.UnpicklingError(f"numbers a value {argument:,} in {len(data):,} bytes")
    return _Unpickler(io.BytesIO(data), encoding="bytes").load()
