"""Reads a pickle of plain containers and byte arrays, as CIFAR's python archives are, and nothing else.

No class or function that a pickle names is ever looked up. The few names that numpy's arrays are pickled under mean the
stand-ins below, which rebuild an array of bytes from its raw data: numpy's own unpickling trusts what it reads.
"""

import io
import pickle
import pickletools
from typing import Any

import numpy as np

from dia_diffusion.data.image_set import Pixels


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
