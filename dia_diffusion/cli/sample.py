"""`dia-diffusion sample`: images from a pipeline or a run; also under `accelerate launch sample/sample.py`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.console import Counter, SharedProgress, console
from dia_diffusion.cli.sampling_options import add_sampling_options, check_batch_size, load_for_sampling
from dia_diffusion.distributed import on_main, start_accelerator
from dia_diffusion.errors import InputError
from dia_diffusion.pipelines.folder import model_hash, weights_hash
from dia_diffusion.sampling.load import find_pipeline
from dia_diffusion.sampling.seeds import my_share, parse_seeds
from dia_diffusion.sampling.writers import open_folder, png_path, save_grid, save_npz, save_png


def run(arguments: Sequence[str]) -> None:
    """Samples what the arguments say."""
    parser = CommandParser("sample", "Draws images from a pipeline folder or a run. An image belongs to its seed.")
    parser.add_argument("source", metavar="PIPELINE_OR_RUN", help="a pipeline folder, or a run folder")
    parser.add_argument("--step", type=int, help="which of a run's pipelines; the newest if none")
    parser.add_argument("--seeds", default="0-63", help="such as 0-63 or 1,5,7-9: one image a seed")
    add_sampling_options(parser)
    parser.add_argument("--grid", type=Path, help="a PNG of all images side by side, in the order of the seeds")
    parser.add_argument("--out", type=Path, help="a folder of PNGs named by seed, or a file ending in .npz")
    options = parser.parse_args(arguments)
    if options.grid is None and options.out is None:
        raise InputError("nothing to write; give --grid FILE.png, --out FOLDER or --out FILE.npz")
    if options.grid is not None and (options.grid.suffix.lower() != ".png" or options.grid.is_dir()):
        raise InputError(f"--grid {options.grid}: accepted is a file ending in .png")
    check_batch_size(options)
    seeds = parse_seeds(options.seeds)
    accelerator = start_accelerator()
    folder = find_pipeline(options.source, options.step)
    pipeline, settings = load_for_sampling(folder, options, accelerator.device)
    as_npz = options.out is not None and options.out.suffix == ".npz"
    if as_npz and options.out.exists():
        raise InputError(f"--out {options.out} exists; choose another name, or remove it")
    for path in (options.grid, options.out):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)  # fails here rather than after the sampling
    pngs = None if options.out is None or as_npz else options.out
    if pngs is not None:
        model = {"weights": weights_hash(folder), "model": model_hash(folder)}
        manifest = {**model, "precision": options.precision, **settings.to_dict(pipeline)}
        on_main(accelerator, lambda: open_folder(pngs, manifest))

    keep = as_npz or options.grid is not None
    mine = list(my_share(seeds, accelerator.process_index, accelerator.num_processes))
    if pngs is not None and not keep:
        # Images that the folder holds already are those that would be drawn again.
        mine = [seed for seed in mine if not png_path(pngs, seed).is_file()]
    kept: list[Tensor] = []
    with Counter("sampling", "images") as counter:
        progress = SharedProgress(counter, len(mine) * accelerator.num_processes, accelerator)
        for batch, images in settings.generate(pipeline, mine, options.batch_size, progress):
            if pngs is not None:
                for seed, image in zip(batch, images, strict=True):
                    save_png(pngs, seed, image)
            if keep:
                kept.append(images)

    if keep:
        images = _gather(kept, len(seeds), pipeline.image_shape, accelerator)
        if as_npz:
            on_main(accelerator, lambda: save_npz(options.out, seeds, images))
        if options.grid is not None:
            on_main(accelerator, lambda: save_grid(images, options.grid, settings.grid_columns(seeds)))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in (options.grid, options.out):
            if path is not None:
                console.print(f"{len(seeds):,} images of {folder}: {path}")
    accelerator.end_training()


def _gather(kept: list[Tensor], count: int, shape: tuple[int, ...], accelerator: Accelerator) -> Tensor:
    """All processes' images, uint8 (count, C, H, W), in the order of the seeds that my_share dealt out."""
    world = accelerator.num_processes
    share = -(-count // world)
    mine = torch.zeros(share, *shape, dtype=torch.uint8)
    start = 0
    for images in kept:
        mine[start : start + len(images)] = images
        start += len(images)
    gathered = accelerator.gather(mine.to(accelerator.device)).cpu()  # (world * share, C, H, W), process by process
    return gathered.unflatten(0, (world, share)).transpose(0, 1).flatten(0, 1)[:count]
