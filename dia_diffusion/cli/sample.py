"""`dia-diffusion sample`: images from a pipeline or a run; also under `accelerate launch sample/sample.py`."""

from collections.abc import Sequence
from pathlib import Path

from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.imports import imports
from dia_diffusion.cli.sampling_options import add_sampling_options, check_batch_size
from dia_diffusion.errors import InputError
from dia_diffusion.pipelines.folder import find_pipeline
from dia_diffusion.sampling.samplers import check_sampler_name, parse_seeds


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
    check_sampler_name(options.sampler)
    seeds = parse_seeds(options.seeds)
    folder = find_pipeline(options.source, options.step)
    with imports():
        from dia_diffusion.cli.drawing import draw
    draw(folder, seeds, options)
