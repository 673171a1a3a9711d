"""Features on disk in order of image, filled chunk by chunk, so that a pass that was killed goes on where it was."""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from einops import rearrange
from filelock import Timeout

from dia_diffusion.data import ImageSet
from dia_diffusion.distributed import broadcast_from_rank_zero, on_all_ranks, on_rank_zero, shard
from dia_diffusion.errors import InputError, RunError
from dia_diffusion.evaluation.features import FeatureExtractor
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


ImagesOf = Callable[[Sequence[int]], Iterable[torch.Tensor]]
"""Images by their indices (a pipeline's: by their seeds), as uint8 batches (B, C, H, W), in that order."""


BATCH = 64  # images of a set measured at once


class Reporter(Protocol):
    """What a pass tells while it works."""

    def going_on(self, done: int, total: int) -> None:
        """So many images were measured before, by a command that was stopped."""

    def computing(self, what: str, done: int = 0, total: int = 0) -> None:
        """A metric is being computed from the features; of the bootstrap, how many resamples are done."""


class _Silent:
    def going_on(self, done: int, total: int) -> None: ...

    def computing(self, what: str, done: int = 0, total: int = 0) -> None: ...


SILENT = _Silent()
"""A reporter that tells nothing."""


def batches_of(images: ImageSet, progress: Callable[[float], None] | None = None) -> ImagesOf:
    """A set's images by their indices; `progress` is told the size of each batch that was measured."""

    def batches(indices: Sequence[int]) -> Iterator[torch.Tensor]:
        for start in range(0, len(indices), BATCH):
            batch = images.read(indices[start : start + BATCH])
            yield torch.from_numpy(batch)
            if progress is not None:  # the caller has measured the batch when it asks for the next
                progress(len(batch))

    return batches


def widths_of(extractor: FeatureExtractor, logits: bool) -> dict[str, int]:
    """The arrays of an extractor's feature file, each with its width. Raises InputError for missing logits."""
    if not logits:
        return {"features": extractor.num_features}
    if extractor.num_classes is None:
        raise InputError(f"features {extractor.name} have no logits, which the Inception score (isc) needs")
    return {"features": extractor.num_features, "logits": extractor.num_classes}


@contextmanager
def open_on_main(
    accelerator: Accelerator, folder: Path | None, widths: dict[str, int], count: int, *, cache: bool = False
) -> Iterator[FeatureFile | None]:
    """The feature file in a folder, on the main process; None elsewhere. `folder` None: a temporary one.

    cache: the folder is every command's: this one waits for another that fills it, and does without where it can't be
        written, in a temporary one.
    """
    with ExitStack() as stack:
        opened: list[FeatureFile] = []

        def open_in(place: Path) -> None:
            opened.append(stack.enter_context(open_feature_file(place, widths, count, wait=cache)))

        def open_it() -> None:
            try:
                open_in(folder or Path(stack.enter_context(tempfile.TemporaryDirectory())))
            except OSError:
                if not cache:
                    raise
                open_in(Path(stack.enter_context(tempfile.TemporaryDirectory())))

        on_rank_zero(accelerator, open_it)
        yield opened[0] if opened else None


def fill(
    file: FeatureFile | None,
    count: int,
    images: ImagesOf,
    extractor: FeatureExtractor,
    accelerator: Accelerator,
    widths: dict[str, int],
    source: str,
    reporter: Reporter,
) -> None:
    """Adds the chunks that the main process's file of `count` images still misses; the other processes have no file.

    Each chunk is divided over the processes, collected in order and written by the main one, so that another number of
    processes can go on with what the first ones left. Raises InputError where `images` gives too few.
    """
    missing = broadcast_from_rank_zero(
        accelerator, lambda: [(chunk.start, chunk.stop) for chunk in file.missing] if file else []
    )
    done = count - sum(stop - start for start, stop in missing)
    if done:
        reporter.going_on(done, count)
    for start, stop in missing:
        began = time.monotonic()
        mine = shard(range(start, stop), accelerator.process_index, accelerator.num_processes)
        share = on_all_ranks(accelerator, partial(_measure, mine, images, extractor, widths, source))
        rows = {name: _in_order(accelerator, part, stop - start) for name, part in share.items()}
        if file is None:
            on_rank_zero(accelerator, lambda: None)
        else:
            on_rank_zero(accelerator, partial(file.write, range(start, stop), rows, time.monotonic() - began))


def _measure(
    indices: Sequence[int], images: ImagesOf, extractor: FeatureExtractor, widths: dict[str, int], source: str
) -> dict[str, torch.Tensor]:
    """The rows of these images, on the extractor's device; they are one chunk's at most."""
    parts = {name: [torch.zeros(0, width, device=extractor.device)] for name, width in widths.items()}
    for batch in images(indices):
        layers = extractor.with_logits(batch) if "logits" in widths else (extractor(batch),)
        for name, rows in zip(("features", "logits"), layers, strict=False):
            parts[name].append(rows)
    found = {name: torch.cat(rows) for name, rows in parts.items()}
    if len(found["features"]) != len(indices):
        raise InputError(f"{len(indices)} images asked for, {source} gave {len(found['features'])}")
    return found


def _in_order(accelerator: Accelerator, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Every process's rows (B, D) of its share of `count` images, put on_all_ranks as (count, D), in order of image."""
    processes = accelerator.num_processes
    if processes == 1:
        return rows
    longest = -(-count // processes)
    padded = F.pad(rows.to(accelerator.device), (0, 0, 0, longest - len(rows)))
    gathered = accelerator.gather(padded)  # (processes * longest, D)
    return rearrange(gathered, "(process row) d -> (row process) d", process=processes)[:count]
