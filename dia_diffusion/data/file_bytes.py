"""An image file's bytes, of which there may only be so many."""

import stat
from pathlib import Path

FILE_LIMIT = 1 << 28
"""An image file may hold this many bytes, in a zip after decompression."""


def read_file(path: Path) -> bytes:
    """An image file's bytes; ValueError for more than FILE_LIMIT of them, and for what is no regular file."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
        raise ValueError("not a regular file")
    with path.open("rb") as file:  # of a limit alone, all of it would be allocated for every file
        return bounded(file.read(min(status.st_size, FILE_LIMIT) + 1))


def bounded(data: bytes) -> bytes:
    """The bytes of an image file as they are, unless there are too many (ValueError)."""
    if len(data) > FILE_LIMIT:
        raise ValueError(f"more than the {FILE_LIMIT >> 20} MiB accepted for one image")
    return data
