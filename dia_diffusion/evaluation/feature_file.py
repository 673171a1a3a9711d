"""Features on disk in order of image, filled chunk by chunk, so that a pass that was killed goes on where it was."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from filelock import Timeout

from dia_diffusion.errors import RunError
from dia_diffusion.io import naming, native_lock, write_json
from dia_diffusion.reading import read_json_object
from dia_diffusion.reading.typed import fits

MIN_CHUNK, MAX_CHUNK, CHUNKS = 500, 2500, 20
FINISHED = "finished.json"


def chunks_of(count: int) -> list[range]:
    """0..count-1 in consecutive ranges, the same for every batch size and number of processes.

    Twenty, but none of fewer than 500 images, which would cost speed, nor of many more than 2,500, which would cost
    memory: a chunk's features are held before they are written.
    """
    number = max(1, min(count // MIN_CHUNK, max(CHUNKS, count // MAX_CHUNK)))
    bounds = [index * count // number for index in range(number + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


class FeatureFile:
    """A folder of arrays NAME.npy, float32 (count, width), row k of image k, and of which chunks are finished.

    A chunk counts as finished once its rows are flushed and `finished.json` holds their sha256. Rows that no longer
    have it are made again, so neither a kill nor a torn file changes a number.
    """

    def __init__(self, folder: Path, widths: dict[str, int], count: int) -> None:
        """Opens the folder, or begins it. `widths`: the row length of each array. Use `open_feature_file`."""
        self.folder, self.widths, self.chunks = folder, widths, chunks_of(count)
        self._finished: dict[int, dict[str, str | float]] = {}  # by the chunk's first image
        self._offsets: dict[str, int] = {}
        for name, width in widths.items():
            path = self._path(name)
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError):  # not there yet, or truncated
                array = None
            if array is None or array.shape != (count, width) or array.dtype != np.float32:
                with naming(path):
                    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, width))
            self._offsets[name] = array.offset
        try:
            finished = read_json_object(folder / FINISHED)
            self._finished = {
                chunk.start: finished[str(chunk.start)]
                for chunk in self.chunks
                if str(chunk.start) in finished
                and finished[str(chunk.start)]["sha256"] == self._sha256(chunk)
                and fits(finished[str(chunk.start)]["seconds"], float)
            }
        except (OSError, ValueError, KeyError, TypeError):
            self._finished = {}

    @property
    def missing(self) -> list[range]:
        """The chunks still to be made."""
        return [chunk for chunk in self.chunks if chunk.start not in self._finished]

    @property
    def seconds(self) -> float:
        """What making the finished chunks took."""
        return sum(float(entry["seconds"]) for entry in self._finished.values())

    def write(self, chunk: range, rows: dict[str, torch.Tensor], seconds: float) -> None:
        """Adds a chunk: rows (len(chunk), width) for each array, which took `seconds` to make."""
        for name, tensor in rows.items():
            path = self._path(name)
            with naming(path), path.open("r+b") as file:  # in a memory map a full disk would be a SIGBUS
                file.seek(self._offsets[name] + chunk.start * self.widths[name] * 4)
                file.write(tensor.to("cpu", torch.float32).contiguous().numpy().data)
                file.flush()
                os.fsync(file.fileno())
        self._finished[chunk.start] = {"seconds": seconds, "sha256": self._sha256(chunk)}
        write_json(self.folder / FINISHED, self._finished)

    def read(self, name: str) -> torch.Tensor:
        """An array (count, width), memory-mapped: only the rows that are looked at come into memory."""
        return torch.from_numpy(np.load(self._path(name), mmap_mode="c", allow_pickle=False))

    def _sha256(self, chunk: range) -> str:
        digest = hashlib.sha256()
        for name in sorted(self.widths):
            rows = np.load(self._path(name), mmap_mode="r", allow_pickle=False)[chunk.start : chunk.stop]
            digest.update(rows.tobytes())
        return digest.hexdigest()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"


@contextmanager
def open_feature_file(folder: Path, widths: dict[str, int], count: int, *, wait: bool = False) -> Iterator[FeatureFile]:
    """The feature file in `folder`, for this process alone.

    Where another one is writing to it: with `wait`, once that has finished or died; else raises RunError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = native_lock(folder / ".lock")
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        raise RunError(f"another process is measuring the same images into {folder}") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield FeatureFile(folder, widths, count)
    finally:
        lock.release()
