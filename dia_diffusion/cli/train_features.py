"""`dia-diffusion train-features`: trains the classifier whose features a distance is measured in."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dia_diffusion.cli.console import ConsoleProgress
from dia_diffusion.cli.options import Metavar, Positional
from dia_diffusion.validation import Strict


class Options(Strict):
    """Trains a classifier whose features a distance is measured in."""

    name: Annotated[Literal["digits", "cifar10"], Positional("NAME")]
    """Which features: digits or cifar10."""
    data: Annotated[str | None, Metavar("DATA")] = None
    """Images in ten classes; if not given, those the features are named for."""
    test_data: Annotated[str | None, Metavar("DATA")] = None
    """Other images to test on, all of them; if not given, the test part of --data."""
    out: Annotated[Path | None, Metavar("FILE.safetensors")] = None
    """Where the weights go; NAME.safetensors if not given. cifar10 keeps its run beside them, in FILE.run."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of weights, batches and augmentation."""


def run(options: Options) -> None:
    """Trains the classifier and saves its weights."""
    from dia_diffusion.evaluation.train_features import train_features

    out = options.out or Path(f"{options.name}.safetensors")
    reporter = ConsoleProgress()
    try:
        train_features(
            options.name, out, data=options.data, test_data=options.test_data, seed=options.seed, reporter=reporter
        )
    finally:
        reporter.close()
