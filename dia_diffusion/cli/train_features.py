"""`dia-diffusion train-features`: trains the classifier whose features a distance is measured in."""

from collections.abc import Sequence
from pathlib import Path

from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.console import ConsoleReporter
from dia_diffusion.errors import InputError


def run(arguments: Sequence[str]) -> None:
    """Trains what the arguments say."""
    parser = CommandParser("train-features", "Trains a classifier whose features a distance is measured in.")
    parser.add_argument("name", choices=("digits", "cifar10"), help="which features")
    parser.add_argument(
        "--data", metavar="DATA", help="images in ten classes; if none, those the features are named for"
    )
    parser.add_argument(
        "--test-data", metavar="DATA", help="other images to test on, all of them; if none, the test part of --data"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.safetensors",
        help="where the weights go; NAME.safetensors if none. cifar10 keeps its run beside them, in FILE.run",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and augmentation")
    options = parser.parse_args(arguments)

    out = options.out or Path(f"{options.name}.safetensors")
    if not 0 <= options.seed < 2**63:
        raise InputError(f"--seed is {options.seed}; accepted: 0 to 2**63 - 1")

    from dia_diffusion.evaluation.train_features import train_features

    data, test_data, seed = options.data, options.test_data, options.seed
    reporter = ConsoleReporter()
    try:
        train_features(options.name, out, data=data, test_data=test_data, seed=seed, reporter=reporter)
    finally:
        reporter.close()
