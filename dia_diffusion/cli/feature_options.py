"""The options that name features, and the extractor they lead to."""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.console import ConsoleReporter, console
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.feature_names import ACCEPTED, PACKAGED

if TYPE_CHECKING:
    import torch

    from dia_diffusion.evaluation.features import FeatureExtractor

DEFAULT = "those of a file of statistics, digits for the digits, and cifar10 for others"


def add_feature_options(parser: CommandParser) -> None:
    """--features and --inception-weights."""
    parser.add_argument("--features", help=f"one of {ACCEPTED}; if none, {DEFAULT}")
    parser.add_argument(
        "--inception-weights",
        type=Path,
        metavar="FILE",
        help="of torch-fidelity's Inception, .pth or .safetensors; if none, torch's hub folder has them, or a download",
    )


def load_features(options: argparse.Namespace, data: str, device: "str | torch.device") -> "FeatureExtractor":
    """The extractor that the options name, or that suits the data; its download, if any, is shown on the terminal."""
    from dia_diffusion.evaluation.features import build_features

    name = options.features or _features_for(data)
    if options.inception_weights is not None and name != "inception":
        raise InputError(f"--inception-weights with --features {name}; accepted: --features inception")
    progress = partial(ConsoleReporter().reading, "bytes")
    return build_features(name, device, options.inception_weights, progress)


def tell_unreleased(options: argparse.Namespace, extractor: "FeatureExtractor") -> None:
    """One line where the weights given aren't the released Inception."""
    from dia_diffusion.evaluation.features.inception import unreleased

    if options.inception_weights is not None and (told := unreleased(extractor.name, options.inception_weights)):
        console.print(f"warning: {told}")


def _features_for(data: str) -> str:
    """Those that a file of statistics is in, where it says so; else those that suit the images."""
    from dia_diffusion.evaluation.statistics_files import is_statistics_file, read_statistics

    if Path(data).is_file() and is_statistics_file(data) and (name := read_statistics(data).features) is not None:
        if name not in PACKAGED:  # these might be downloaded, or be a module to run, which takes asking for by name
            raise InputError(f"{data} holds statistics in features {name}; name them with --features")
        return name
    return "digits" if data == "digits" else "cifar10"
