"""Features of many images on disk, a checksummed file per chunk, so that a killed evaluation resumes after a chunk."""

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from einops import rearrange
from filelock import Timeout

from dia_diffusion.data import ImageSet
from dia_diffusion.distributed import broadcast_from_rank_zero, on_all_ranks, on_rank_zero, shard
from dia_diffusion.errors import InputError, RunError
from dia_diffusion.evaluation.features.extractor import FeatureExtractor
from dia_diffusion.evaluation.frechet import UNREADABLE, load_tensors, save_tensors
from dia_diffusion.io import remove_partial
from dia_diffusion.locks import native_lock
from dia_diffusion.progress import Advance, Progress
from dia_diffusion.reading import parse_json

BATCH = 64
"""Images sampled and measured at once."""
MIN_CHUNK, MAX_CHUNK, CHUNKS = 500, 2500, 20
CHUNK_FILES = "chunk-*.safetensors"

ImagesOf = Callable[[Sequence[int], Advance], Iterable[torch.Tensor]]
"""Images by index (for a pipeline, by seed), as uint8 batches (B, C, H, W), in that order."""


def chunks_of(count: int) -> list[range]:
    """0..count-1 in consecutive ranges, the same for every batch size and number of processes.

    Twenty ranges, but none with fewer than 500 images, which would cost speed, or with many more than 2,500, which
    would cost memory, since a chunk's features are held until they are written.
    """
    number = max(1, min(count // MIN_CHUNK, max(CHUNKS, count // MAX_CHUNK)))
    bounds = [index * count // number for index in range(number + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def batches_of(images: ImageSet) -> ImagesOf:
    """A set's images by their indices; for a GPU the next batch is read while the caller measures one."""

    def read(indices: Sequence[int]) -> torch.Tensor:
        batch = torch.from_numpy(images.read(indices))
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def batches(indices: Sequence[int], advance: Advance) -> Iterator[torch.Tensor]:
        parts = [indices[start : start + BATCH] for start in range(0, len(indices), BATCH)]
        for batch in read_ahead(read, parts) if torch.accelerator.is_available() else map(read, parts):
            yield batch
            advance(len(batch))  # the caller has measured the batch when it asks for the next

    return batches


def read_ahead(read: Callable[[Sequence[int]], torch.Tensor], parts: list[Sequence[int]]) -> Iterator[torch.Tensor]:
    """Yields `read` of each part; the next part is read in a thread while the caller works."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting: Future[torch.Tensor] | None = None
        for part in parts:
            done, waiting = waiting, thread.submit(read, part)
            if done is not None:
                yield done.result()
        if waiting is not None:
            yield waiting.result()


class FeatureStore:
    """A folder with the features, and possibly other layers, of images 0 to count - 1; row k belongs to image k.

    A chunk whose file is missing, truncated or altered is made again.
    """

    def __init__(self, folder: Path, widths: dict[str, int], count: int) -> None:
        """Use `open_store`. `widths`: the row length of each array, such as features."""
        self.folder, self.widths, self.count, self.chunks = folder, widths, count, chunks_of(count)
        self.missing: list[range] = []
        """The chunks still to be made."""
        self.resumed_seconds = 0.0
        """Seconds that the other chunks took."""
        for chunk in self.chunks:
            try:
                self.resumed_seconds += self._read(chunk)[1]
            except UNREADABLE:
                self.missing.append(chunk)

    def write(self, chunk: range, rows: dict[str, torch.Tensor], seconds: float) -> None:
        """Adds a chunk: rows (len(chunk), width) of each array, which took `seconds` to make."""
        tensors = {name: rows[name].to("cpu", torch.float32).contiguous() for name in self.widths}
        save_tensors(self._path(chunk), tensors, json.dumps({"seconds": seconds}))

    def read(self, name: str) -> torch.Tensor:
        """A whole array (count, width)."""
        array = torch.empty(self.count, self.widths[name])
        for chunk in self.chunks:
            array[chunk.start : chunk.stop] = self._read(chunk)[0][name]
        return array

    def blocks(self, name: str, size: int) -> Iterator[torch.Tensor]:
        """An array in blocks of `size` rows, independent of the chunks; about one block is in memory at a time."""
        rest = torch.empty(0, self.widths[name])
        for chunk in self.chunks:
            *whole, rest = torch.cat([rest, self._read(chunk)[0][name]]).split(size)
            yield from whole
        yield rest

    def _read(self, chunk: range) -> tuple[dict[str, torch.Tensor], float]:
        arrays, text = load_tensors(self._path(chunk), list(self.widths))
        for array, width in zip(arrays, self.widths.values(), strict=True):
            if array.shape != (len(chunk), width) or array.dtype != torch.float32:
                raise ValueError(f"{self._path(chunk)} holds other arrays")
        return dict(zip(self.widths, arrays, strict=True)), float(parse_json(text)["seconds"])

    def _path(self, chunk: range) -> Path:
        return self.folder / CHUNK_FILES.replace("*", f"{chunk.start:08d}")


@contextmanager
def open_store(folder: Path, widths: dict[str, int], count: int, *, wait: bool = False) -> Iterator[FeatureStore]:
    """The features in `folder`, for this process alone.

    If another process is writing them: with `wait`, waits until it has finished or died; else raises RunError.
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
        remove_partial(folder)
        yield FeatureStore(folder, widths, count)
    finally:
        lock.release()


@dataclass(frozen=True)
class StoreSpec:
    """An extractor, and the folder for its features of the images."""

    extractor: FeatureExtractor
    folder: Path | None = None
    """None: a temporary folder."""
    layers: Sequence[str] = ()
    """Names from `extractor.layers` to keep in addition to the features."""

    @property
    def widths(self) -> dict[str, int]:
        """The row length of each array that is kept."""
        return {name: self.extractor.widths[name] for name in ("features", *self.layers)}


@contextmanager
def filled_stores(
    images: ImagesOf,
    count: int,
    specs: Sequence[StoreSpec],
    accelerator: Accelerator,
    name: str,
    *,
    cache: bool = False,
    progress: Progress,
) -> Iterator[list[FeatureStore | None]]:
    """Each extractor's features of `count` images, measured by all ranks unless stored already; None except on rank 0.

    Each image is made once for all extractors. Each chunk is divided over the ranks, collected in order and written by
    rank 0, so that a different number of processes can resume.

    Args:
        name: of the images, for messages and progress.
        cache: the folders are shared with other commands: wait for a command that is filling one; use a temporary
            folder if one can't be written.

    Raises:
        InputError: `images` yields too few images.
        RunError: another process is writing to a folder.
    """
    with ExitStack() as stack:
        opened: list[FeatureStore] = []

        def open_in(place: Path, spec: StoreSpec) -> None:
            opened.append(stack.enter_context(open_store(place, spec.widths, count, wait=cache)))

        def open_all() -> None:
            for spec in specs:
                try:
                    open_in(spec.folder or Path(stack.enter_context(tempfile.TemporaryDirectory())), spec)
                except OSError:
                    if not cache:
                        raise
                    open_in(Path(stack.enter_context(tempfile.TemporaryDirectory())), spec)

        on_rank_zero(accelerator, open_all)
        stores: list[FeatureStore | None] = [*opened] or [None] * len(specs)
        _fill(stores, images, count, specs, accelerator, name, progress)
        yield stores


@contextmanager
def filled_store(
    images: ImagesOf,
    count: int,
    extractor: FeatureExtractor,
    accelerator: Accelerator,
    name: str,
    *,
    folder: Path | None = None,
    cache: bool = False,
    progress: Progress,
) -> Iterator[FeatureStore | None]:
    """`filled_stores` for one extractor."""
    specs = [StoreSpec(extractor, folder)]
    with filled_stores(images, count, specs, accelerator, name, cache=cache, progress=progress) as (store,):
        yield store


def _fill(
    stores: list[FeatureStore | None],
    images: ImagesOf,
    count: int,
    specs: Sequence[StoreSpec],
    accelerator: Accelerator,
    name: str,
    progress: Progress,
) -> None:
    missing = broadcast_from_rank_zero(  # of each store
        accelerator,
        lambda: [[[chunk.start, chunk.stop] for chunk in store.missing] if store else [] for store in stores],
    )
    chunks = sorted({(start, stop) for own in missing for start, stop in own})
    what, done = f"measuring {name}", float(count - sum(stop - start for start, stop in chunks))
    if chunks and done and accelerator.is_main_process:
        progress.message(f"resuming after {done:,.0f} of {count:,} images")
        progress.resume(what, "images", round(done), count)

    def advance(amount: float) -> None:
        nonlocal done
        done += amount * accelerator.num_processes  # assumes that each rank does as much as this one
        if accelerator.is_main_process:
            progress.update(what, "images", min(round(done), count), count)

    for start, stop in chunks:
        began = time.monotonic()
        without = [place for place, own in enumerate(missing) if [start, stop] in own]
        mine = shard(range(start, stop), accelerator.process_index, accelerator.num_processes)
        measure = partial(_measure, mine, images, [specs[place] for place in without], name, advance)
        for place, share in zip(without, on_all_ranks(accelerator, measure), strict=True):
            rows = {array: _in_order(accelerator, part, stop - start) for array, part in share.items()}
            seconds, store = time.monotonic() - began, stores[place]
            write = (lambda: None) if store is None else partial(store.write, range(start, stop), rows, seconds)
            on_rank_zero(accelerator, write)


def _measure(
    indices: Sequence[int], images: ImagesOf, specs: Sequence[StoreSpec], name: str, advance: Advance
) -> list[dict[str, torch.Tensor]]:
    """Each extractor's rows of these images, on its extractor's device."""
    parts = [
        {array: [torch.zeros(0, width, device=spec.extractor.device)] for array, width in spec.widths.items()}
        for spec in specs
    ]
    for batch in images(indices, advance):
        for spec, own in zip(specs, parts, strict=True):
            layers = spec.extractor.layers(batch)
            for array, rows in own.items():
                rows.append(layers[array])
    measured = [{array: torch.cat(rows) for array, rows in own.items()} for own in parts]
    if (count := len(measured[0]["features"])) != len(indices):
        raise InputError(f"{name} must give {len(indices)} images, got {count}")
    return measured


def _in_order(accelerator: Accelerator, rows: torch.Tensor, count: int) -> torch.Tensor:
    """All ranks' rows (B, D) of `count` images as (count, D), in order of image."""
    processes = accelerator.num_processes
    if processes == 1:
        return rows
    longest = -(-count // processes)
    padded = F.pad(rows.to(accelerator.device), (0, 0, 0, longest - len(rows)))
    gathered = accelerator.gather(padded)  # (processes * longest, D)
    return rearrange(gathered, "(process row) d -> (row process) d", process=processes)[:count]
