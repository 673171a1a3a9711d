"""Hostile files: texts, pickles, arrays and archives, all created on demand."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

GIGABYTES = (1 << 29) + 1  # half a GiB: more than watch.MEMORY_LIMIT and than any file that is read whole


# Texts

JSON_TEXTS: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"{'a': 1}",
    "cut short": b'{"a": [1, 2',
    "a list": b'[{"step": 1}]',
    "a text": b'"text"',
    "a number": b"7",
    "null": b"null",
    "no keys": b"{}",
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "deep and whole": b'{"a":' * 900 + b"1" + b"}" * 900,
    "5,000 digits": b'{"step": ' + b"9" * 5000 + b', "sha256": ' + b"9" * 5000 + b"}",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "NUL bytes": b'{"a": 1\x00}',
    "terminal escapes": b'{"\\u001b[2J\\u001b]0;owned\\u0007": "\\u001b[31m\\n\\r"}',
    "lone surrogate": b'{"\\ud800": "\\udfff"}',
    "YAML tag": b'!!python/object/apply:os.system ["touch marker"]',
}
JSON_FILES = (*JSON_TEXTS, "pipe", "folder", "device", "gigabytes")


def put_json(path: Path, kind: str) -> None:
    """Replaces a file with one of JSON_FILES."""
    if path.is_file():
        path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "gigabytes":
        put_sparse(path)
    else:
        path.write_bytes(JSON_TEXTS[kind])


def change_json(path: Path, **changes: Any) -> None:
    """Replaces values in a file that holds a JSON object."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def put_sparse(path: Path, size: int = GIGABYTES) -> None:
    """Creates a sparse file of `size` bytes, which takes no disk space."""
    with path.open("wb") as file:
        file.truncate(size)


def wrong_values(value: Any) -> dict[str, Any]:
    """For each field of a JSON object, at any depth, copies of the object with a value of another type there."""
    others = ([], {}, "text", -1, 1 << 70, 1e308, float("nan"), float("inf"), None, True, [[]], {"a": {"b": 1}})
    found: dict[str, Any] = {}

    def visit(inner: Any, rebuild: Callable[[Any], Any], name: str) -> None:
        for other in others:
            found[f"{name} = {other!r}"] = rebuild(other)
        if isinstance(inner, dict):
            for key in inner:
                visit(
                    inner[key],
                    lambda new, key=key: rebuild({**inner, key: new}),  # type: ignore[misc]
                    f"{name}.{key}",
                )
                found[f"{name}.{key} missing"] = rebuild({k: v for k, v in inner.items() if k != key})

    visit(value, lambda new: new, "")
    return found


def laughs(levels: int = 12) -> str:
    """A YAML document of a few hundred bytes that expands to 10^levels words."""
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    return "\n".join(lines)


def merges(levels: int = 12) -> str:
    """The same with merge keys, which PyYAML expands while it reads."""
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 10)}]}}")
    return "\n".join(lines)


def yaml_texts(marker: Path) -> dict[str, bytes]:
    """Texts that no reader of recipes, studies or protocols may accept or run."""
    command = f"touch {marker}"
    texts = {
        "object tag": f"data: !!python/object/apply:os.system ['{command}']",
        "subprocess tag": f"data: !!python/object/apply:subprocess.check_output [['touch', '{marker}']]",
        "new tag": f"data: !!python/object/new:os.system ['{command}']",
        "eval tag": f"data: !!python/object/apply:eval [\"open('{marker}', 'w')\"]",
        "module tag": "data: !!python/module:antigravity",
        "name tag": "data: !!python/name:os.system",
        "unknown tag": "data: !thing {a: 1}",
        "bool of text": "seed: !!bool maybe",
        "int of text": "seed: !!int many",
        "date of text": "seed: !!timestamp soon",
        "no such date": "seed: 2020-99-99",
        "billion laughs": laughs(),
        "merged keys": merges(),
        "within itself": "a: &a [*a, *a]",
        "mapping within itself": "a: &a {b: *a}",
        "deep lists": "a: " + "[" * 1_000,
        "deep and whole": "a: " + "[" * 150 + "]" * 150,
        "deep blocks": "\n".join(" " * n + "a:" for n in range(1_000)),
        "5,000 digits": "seed: " + "9" * 5000,
        "hexadecimal digits": "seed: 0x" + "f" * 5000,
        "sexagesimal": "seed: 1" + ":1" * 5000,
        "a list": "- 1\n- 2",
        "a text": "hello",
        "nothing": "",
        "two documents": "a: 1\n---\nb: 2",
        "list as key": "? [1, 2]\n: 3",
        "number as key": "1: 2",
        "null as key": "null: 2",
        "terminal escapes": '"\\e[2J\\e]0;owned\\a": 1',
        "escapes as value": 'seed: "\\e[31m"',
        "tabs": "a:\n\t- b",
        "undefined alias": "a: *nothing",
        "binary": "seed: !!binary aGVsbG8=",
        "set": "seed: !!set {a, b}",
        "not a number": "seed: .nan",
        "infinite": "seed: .inf",
    }
    return {name: text.encode() for name, text in texts.items()} | {
        "not UTF-8": b"seed: \xff\xfe",
        "NUL bytes": b"seed: 0\x00",
        "control characters": b"seed: \x1b[31m",
        "UTF-16": "seed: 0".encode("utf-16"),
        "pickle": pickled(marker),
    }


# Pickles


class Touch:
    """Creates a file if a reader unpickles it."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def pickled(marker: Path, protocol: int = 2) -> bytes:
    return pickle.dumps({"state": Touch(marker)}, protocol=protocol)


def pickled_weights(marker: Path, wrap: bool = True) -> bytes:
    """Written by torch.save, in today's zip format or the one before it."""
    file = io.BytesIO()
    torch.save({"weight": Touch(marker)}, file, _use_new_zipfile_serialization=wrap)
    return file.getvalue()


def object_array(marker: Path) -> np.ndarray:
    return np.array([Touch(marker), None], dtype=object)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npy_header(header: str, data: bytes = b"") -> bytes:
    """A .npy file with an arbitrary header."""
    text = header.encode("latin1").ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def npy_of(shape: str, descr: str = "'|u1'", data: bytes = b"\0" * 64) -> bytes:
    return npy_header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}", data)


# .npy files that no reader accepts
ARRAYS: dict[str, Callable[[Path], bytes]] = {
    "objects": lambda marker: npy(object_array(marker)),
    "pickle": pickled,
    "header of code": lambda _: npy_header("__import__('os').system('touch x')"),
    "header deep": lambda _: npy_header("(" * 100),
    "texts": lambda _: npy(np.array(["1"] * 4)),
    "complex": lambda _: npy(np.zeros((2, 8, 8, 3), complex)),
    "one number": lambda _: npy(np.uint8(1)),
}


# Archives


def write_zip(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


@cache
def _bomb(name: str, size: int, start: bytes) -> tuple[bytes, int]:
    """The zip, and the compressed size of its entry; compressing takes a second."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        entry = zipfile.ZipInfo(name)
        entry.compress_type = zipfile.ZIP_DEFLATED
        with archive.open(entry, "w", force_zip64=True) as file:
            file.write(start)
            block, left = bytes(1 << 24), size
            while left > 0:
                file.write(block[:left])
                left -= len(block)
    return made.getvalue(), archive.getinfo(name).compress_size


def write_bomb(path: Path, name: str, size: int = GIGABYTES, start: bytes = b"", lie: int | None = None) -> Path:
    """A zip with one entry: `start`, then `size` zeros.

    lie: the compressed size that its directory declares.
    """
    data, written = _bomb(name, size, start)
    path.write_bytes(data)
    if lie is not None:
        place = data.rindex(b"PK\x01\x02") + 20
        assert struct.unpack("<I", data[place : place + 4])[0] == written
        path.write_bytes(data[:place] + struct.pack("<I", lie) + data[place + 4 :])
    return path


def write_overlapping(path: Path, name: str, data: bytes, count: int) -> Path:
    """A zip with a directory that lists one stored entry many times."""
    write_zip(path, {name.format(0): data})
    raw = path.read_bytes()
    start, end = raw.index(b"PK\x01\x02"), raw.index(b"PK\x05\x06")
    record = raw[start:end]
    length = len(name.format(0))
    records = [record[:46] + name.format(k).encode().ljust(length, b"x")[:length] for k in range(count)]
    directory = b"".join(records)
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, len(directory), start, 0)
    path.write_bytes(raw[:start] + directory + tail)
    return path
