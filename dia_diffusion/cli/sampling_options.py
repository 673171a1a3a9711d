"""The options that `sample` and `fid` share, and the pipeline they lead to."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.console import console
from dia_diffusion.errors import InputError
from dia_diffusion.pipelines.folder import read_training
from dia_diffusion.sampling.samplers import DEFAULT_SAMPLER, OWN_SAMPLER, PRECISIONS, SAMPLERS, SamplingSettings

if TYPE_CHECKING:
    import torch

    from dia_diffusion.sampling.generate import ImagePipeline

SAMPLING = ("sampler", "steps", "batch_size", "classes", "guidance_scale", "precision")
"""What `add_sampling_options` adds, by the names that they have once parsed."""


def add_sampling_options(parser: CommandParser) -> None:
    """--sampler, --steps, --batch-size, --classes, --guidance-scale, --precision."""
    samplers = f"one of {', '.join(SAMPLERS)}; or {OWN_SAMPLER}, the pipeline's scheduler unchanged"
    parser.add_argument("--sampler", default=DEFAULT_SAMPLER, help=samplers)
    parser.add_argument("--steps", type=int, default=50, help="sampler steps")
    parser.add_argument("--batch-size", type=int, default=64, help="images a process samples at once")
    parser.add_argument("--classes", help="such as 3 or 0,1,2, in turn by seed; all classes of a model if none")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="classifier-free guidance; 1 is none")
    precision = "of the network; auto is bfloat16 where the device multiplies it natively, else float32"
    parser.add_argument("--precision", default="float32", choices=(*PRECISIONS, "auto"), help=precision)


def check_batch_size(options: argparse.Namespace) -> None:
    """Raises InputError before anything is read or written."""
    if options.batch_size < 1:
        raise InputError(f"--batch-size is {options.batch_size}; accepted: 1 or more")


def sampling_settings(options: argparse.Namespace) -> SamplingSettings:
    """The settings that the options name."""
    try:
        classes = None if options.classes is None else tuple(int(part) for part in options.classes.split(","))
    except ValueError:
        raise InputError(f"--classes {options.classes} is not a list of numbers such as 0,1,2") from None
    return SamplingSettings(options.sampler, options.steps, classes, options.guidance_scale)


def load_for_sampling(
    folder: Path, options: argparse.Namespace, device: "torch.device"
) -> tuple["ImagePipeline", SamplingSettings]:
    """The pipeline of a folder on the device with the options' sampler in use, and the settings that apply to it."""
    import torch

    from dia_diffusion.precision import best_precision
    from dia_diffusion.sampling.generate import adapt_pipeline
    from dia_diffusion.sampling.load import load_pipeline

    if options.precision == "auto":
        chosen = best_precision(device)
        options.precision = chosen.dtype  # which manifests and records keep
        if os.environ.get("RANK", "0") == "0":
            console.print(f"sampling in {chosen}")
    loaded = load_pipeline(folder, device, getattr(torch, options.precision))
    pipeline = adapt_pipeline(loaded, sampling_settings(options))
    settings = pipeline.settings
    training = read_training(folder)
    if settings.guidance_scale != 1 and training and not training["recipe"]["data"]["label_dropout"]:
        raise InputError(
            f"--guidance-scale {settings.guidance_scale} needs a null label that is trained, and {folder} was trained "
            "with data.label_dropout 0; accepted: 1"
        )
    return pipeline, settings
