"""Zip archives that anybody may have made: what a small one unpacks to is bounded before any of it is unpacked."""

from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile, ZipInfo

from dia_diffusion.errors import one_line

RATIO_LIMIT = 200
"""A zip entry of more than a megabyte may be compressed this far."""


def refuse_bomb(archive: ZipFile, path: Path, only: Callable[[ZipInfo], bool] = lambda entry: True) -> None:
    """Raises ValueError for an archive whose entries unpack to far more than its file holds.

    only: which entries will be read.
    """
    entries = [entry for entry in archive.infolist() if only(entry)]
    for entry in entries:
        if entry.file_size > max(1 << 20, RATIO_LIMIT * entry.compress_size):
            raise ValueError(f"its entry {one_line(entry.filename)} is compressed more than {RATIO_LIMIT} times")
    held, declared = path.stat().st_size, sum(entry.compress_size for entry in entries)
    if declared > held:  # they lie over each other, or a size is made up to pass for a lower ratio
        raise ValueError(f"its entries declare {declared:,} bytes and the file holds {held:,}")
