"""What `dia-diffusion sample` does once its options are read: each process draws its share of the images."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from dia_diffusion.cli.console import Counter, SharedProgress, console
from dia_diffusion.cli.sampling_options import load_for_sampling
from dia_diffusion.distributed import broadcast_from_rank_zero, on_all_ranks, on_rank_zero, shard, start_accelerator
from dia_diffusion.errors import InputError, Stopped, number_of
from dia_diffusion.pipelines.folder import model_hash, weights_hash
from dia_diffusion.sampling.generate import ImagePipeline, generate
from dia_diffusion.sampling.samplers import SamplingSettings
from dia_diffusion.sampling.writers import missing_seeds, open_folder, save_grid, save_npz, save_png


def draw(folder: Path, seeds: Sequence[int], options: argparse.Namespace) -> None:
    """Draws the images of seeds by the command's options and writes them where these say."""
    accelerator = start_accelerator()
    as_npz = options.out is not None and options.out.suffix == ".npz"
    pipeline, settings = on_all_ranks(accelerator, partial(_prepare, folder, options, accelerator.device))
    pngs = None if options.out is None or as_npz else options.out
    if pngs is not None:
        model = {"weights": weights_hash(folder), "model": model_hash(folder)}
        manifest = {**model, "precision": options.precision, **pipeline.to_dict()}
        on_rank_zero(accelerator, lambda: open_folder(pngs, manifest))

    keep = as_npz or options.grid is not None
    missing = seeds
    if pngs is not None and not keep:
        # Images that the folder holds already are those that would be drawn again.
        missing = broadcast_from_rank_zero(accelerator, lambda: missing_seeds(pngs, seeds))
    mine = list(shard(missing, accelerator.process_index, accelerator.num_processes))
    kept: list[Tensor] = []
    with Counter("sampling", "images") as counter, _going_on(keep):
        progress = SharedProgress(counter, len(missing), accelerator)
        batches = generate(pipeline, mine, options.batch_size, progress)

        def draw_next_batch() -> None:
            for batch, images in islice(batches, 1):  # a process may have one batch less than the others
                if pngs is not None:
                    for seed, image in zip(batch, images, strict=True):
                        save_png(pngs, seed, image)
                if keep:
                    kept.append(images)

        for _ in range(0, -(-len(missing) // accelerator.num_processes), options.batch_size):
            on_all_ranks(accelerator, draw_next_batch)  # where one process fails, the others don't draw on for hours

    if keep:
        images = _gather(kept, len(seeds), pipeline.image_shape, accelerator)
        if as_npz:
            on_rank_zero(accelerator, lambda: save_npz(options.out, seeds, images))
        if options.grid is not None:
            on_rank_zero(accelerator, lambda: save_grid(images, options.grid, settings.grid_columns(seeds)))
    if accelerator.is_main_process:
        for path in (options.grid, options.out):
            if path is not None:
                console.print(f"{len(seeds):,} images of {folder}: {path}")
    accelerator.end_training()


def _prepare(folder: Path, options: argparse.Namespace, device: torch.device) -> tuple[ImagePipeline, SamplingSettings]:
    """The pipeline and its settings; raises here rather than after the sampling where the files can't be written."""
    if options.out is not None and options.out.suffix == ".npz" and options.out.exists():
        raise InputError(f"--out {options.out} exists; choose another name, or remove it")
    for path in (options.grid, options.out):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    return load_for_sampling(folder, options, device)


@contextmanager
def _going_on(keep: bool) -> Iterator[None]:
    """Makes a signal say what is there."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        text = "stopped; the same command draws the images that are missing"
        if keep:
            text = "stopped before all images were there; the same command draws them anew"
        raise Stopped(number_of(interrupt), text) from None


def _gather(kept: list[Tensor], count: int, shape: tuple[int, ...], accelerator: Accelerator) -> Tensor:
    """All processes' images, uint8 (count, C, H, W), in the order of the seeds that `shard` split."""
    world = accelerator.num_processes
    share = -(-count // world)
    mine = torch.zeros(share, *shape, dtype=torch.uint8)
    start = 0
    for images in kept:
        mine[start : start + len(images)] = images
        start += len(images)
    gathered = accelerator.gather(mine.to(accelerator.device)).cpu()  # (world * share, C, H, W), process by process
    return gathered.unflatten(0, (world, share)).transpose(0, 1).flatten(0, 1)[:count]
