"""Weights files with false headers, or with other contents than their name says."""

import json
import struct
from pathlib import Path
from typing import Any

from tests.security.hostile import (
    npy,
    object_array,
    pickled,
    pickled_weights,
    put_json,
    put_sparse,
)


def safetensors(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with an arbitrary header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", (len(text) if length is None else length) & (1 << 64) - 1) + text + data


def tensor(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def lying_weights(marker: Path) -> dict[str, bytes]:
    """Files named .safetensors that hold no valid tensors, keyed by what is wrong with them."""
    one = tensor([2], [0, 8])
    return {
        "empty": b"",
        "seven bytes": b"\0" * 7,
        "header of 2^60": safetensors({"a": one}, bytes(8), 1 << 60),
        "header of 2^64 - 1": safetensors({"a": one}, bytes(8), (1 << 64) - 1),
        "header past the end": safetensors({"a": one}, bytes(8), 5000),
        "header of nothing": safetensors(b""),
        "header not JSON": safetensors(b"{'a': 1}"),
        "header a list": safetensors(b"[1, 2]"),
        "header not UTF-8": safetensors(b'{"\xff\xfe": 1}'),
        "deep header": safetensors(b"[" * 100_000),
        "deep metadata": safetensors(b'{"__metadata__":' + b'{"a":' * 9000 + b"1" + b"}" * 9001),
        "offsets past the end": safetensors({"a": tensor([200], [0, 800])}, bytes(8)),
        "offsets of 2^63": safetensors({"a": tensor([2], [1 << 63, (1 << 63) + 8])}, bytes(8)),
        "offsets reversed": safetensors({"a": tensor([2], [8, 0])}, bytes(8)),
        "offsets overlapping": safetensors({"a": one, "b": one}, bytes(8)),
        "offsets with a hole": safetensors({"a": one, "b": tensor([2], [16, 24])}, bytes(24)),
        "bytes left over": safetensors({"a": one}, bytes(800)),
        "unknown type": safetensors({"a": tensor([2], [0, 8], "F31")}, bytes(8)),
        "type of objects": safetensors({"a": tensor([1], [0, 8], "O")}, bytes(8)),
        "shape overflows": safetensors({"a": tensor([1 << 33, 1 << 33], [0, 8])}, bytes(8)),
        "negative shape": safetensors({"a": tensor([-2], [0, 8])}, bytes(8)),
        "shape of fractions": safetensors(b'{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,8]}}', bytes(8)),
        "shape of digits": safetensors(
            b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', bytes(8)
        ),
        "shape beyond its bytes": safetensors({"a": tensor([1000, 1000], [0, 8])}, bytes(8)),
        "no shape": safetensors({"a": {"dtype": "F32"}}, bytes(8)),
        "pickle": pickled(marker),
        "torch's pickle": pickled_weights(marker),
        "torch's older pickle": pickled_weights(marker, wrap=False),
        "numpy objects": npy(object_array(marker)),
        "zip": b"PK\x03\x04" + bytes(100),
        "gigabytes of nothing": b"",  # see put_weights
        "pipe": b"",
        "folder": b"",
        "device": b"",
    }


def put_weights(path: Path, kind: str, marker: Path) -> None:
    """Replaces a weights file with one of `lying_weights`."""
    path.unlink(missing_ok=True)
    if kind == "gigabytes of nothing":
        put_sparse(path)
    elif kind in ("pipe", "folder", "device"):
        put_json(path, kind)
    else:
        path.write_bytes(lying_weights(marker)[kind])


LYING_WEIGHTS = tuple(lying_weights(Path("nowhere")))
