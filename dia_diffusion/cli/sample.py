"""`dia-diffusion sample`: images from a pipeline or a run; also under `accelerate launch sample/sample.py`."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dia_diffusion.cli.console import Counter, SharedProgress, console
from dia_diffusion.cli.options import Positional
from dia_diffusion.cli.shared_options import SamplingOptions, load_for_sampling
from dia_diffusion.errors import InputError, Stopped, number_of
from dia_diffusion.io import check_writable

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor

    from dia_diffusion.sampling.generate import ImagePipeline


class Options(SamplingOptions):
    """Draws images from a pipeline folder or a run. A seed always gives the same image."""

    source: Annotated[str, Positional("PIPELINE_OR_RUN")]
    """A pipeline folder, or a run folder."""
    step: int | None = None
    """Step of a run's pipeline; the newest if not given."""
    seeds: str = "0-63"
    """Such as 0-63 or 1,5,7-9: one image per seed."""
    grid: Path | None = None
    """A PNG of all images side by side, in the order of the seeds."""
    out: Path | None = None
    """A folder of PNGs named by seed, or a file ending in .npz."""


def run(options: Options) -> None:
    """Each process draws its share of the images and writes its PNGs; the grid and the npz are gathered."""
    from dia_diffusion.distributed import (
        broadcast_from_rank_zero,
        on_all_ranks,
        on_rank_zero,
        shard,
        start_accelerator,
    )
    from dia_diffusion.pipelines.folder import find_pipeline, model_hash, weights_hash
    from dia_diffusion.sampling.generate import generate
    from dia_diffusion.sampling.samplers import check_sampler_name, parse_seeds
    from dia_diffusion.sampling.writers import missing_seeds, open_folder, save_grid, save_npz, save_png

    grid, out = options.grid, options.out
    if grid is None and out is None:
        raise InputError("nothing to write; give --grid FILE.png, --out FOLDER or --out FILE.npz")
    if grid is not None and (grid.suffix.lower() != ".png" or grid.is_dir()):
        raise InputError(f"`--grid` must be a file ending in .png, got {grid}")
    check_sampler_name(options.sampler)
    seeds = parse_seeds(options.seeds)
    folder = find_pipeline(options.source, options.step)

    accelerator = start_accelerator()
    pipeline, precision = on_all_ranks(accelerator, partial(_prepare, folder, options, accelerator.device))
    npz = out if out is not None and out.suffix == ".npz" else None
    pngs = out if npz is None else None
    if pngs is not None:
        model = {"weights": weights_hash(folder), "model": model_hash(folder)}
        manifest = {**model, "precision": precision, **pipeline.to_dict()}
        on_rank_zero(accelerator, lambda: open_folder(pngs, manifest))

    keep = npz is not None or grid is not None
    missing = seeds
    if pngs is not None and not keep:
        # Images that are already in the folder would come out the same.
        missing = broadcast_from_rank_zero(accelerator, lambda: missing_seeds(pngs, seeds))
    mine = list(shard(missing, accelerator.process_index, accelerator.num_processes))
    kept: list[Tensor] = []
    with Counter("sampling", "images") as counter, _explain_interrupt(keep):
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
            on_all_ranks(accelerator, draw_next_batch)  # if one process fails, the others don't continue for hours

    if keep:
        images = _gather(kept, len(seeds), pipeline.image_shape, accelerator)
        if npz is not None:
            on_rank_zero(accelerator, lambda: save_npz(npz, seeds, images))
        if grid is not None:
            on_rank_zero(accelerator, lambda: save_grid(images, grid, pipeline.settings.grid_columns(seeds)))
    if accelerator.is_main_process:
        for path in (grid, out):
            if path is not None:
                console.print(f"{len(seeds):,} images of {folder}: {path}")
    accelerator.end_training()


def _prepare(folder: Path, options: Options, device: "torch.device") -> tuple["ImagePipeline", str]:
    """Returns the same as `load_for_sampling`; raises now, not after sampling, if the files can't be written."""
    if options.grid is not None:
        check_writable(options.grid, "`--grid`")
    if options.out is not None and options.out.suffix == ".npz":
        if options.out.exists():
            raise InputError(f"`--out` must be a new file, got {options.out}, which exists")
        check_writable(options.out, "`--out`")
    return load_for_sampling(folder, options, device)


@contextmanager
def _explain_interrupt(keep: bool) -> Iterator[None]:
    """Makes the message for a signal say what is kept."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        text = "stopped; the same command draws the missing images"
        if keep:
            text = "stopped before all images were drawn; the same command draws them again"
        raise Stopped(number_of(interrupt), text) from None


def _gather(kept: "list[Tensor]", count: int, shape: tuple[int, ...], accelerator: "Accelerator") -> "Tensor":
    """All processes' images, uint8 (count, C, H, W), in the order of the seeds that `shard` distributed."""
    import torch

    world = accelerator.num_processes
    share = -(-count // world)
    mine = torch.zeros(share, *shape, dtype=torch.uint8)
    start = 0
    for images in kept:
        mine[start : start + len(images)] = images
        start += len(images)
    gathered = accelerator.gather(mine.to(accelerator.device)).cpu()  # (world * share, C, H, W), process by process
    return gathered.unflatten(0, (world, share)).transpose(0, 1).flatten(0, 1)[:count]
