"""`dia-diffusion analyze`: what the attention unit of trained runs does, as figures and the numbers they show."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dia_diffusion.cli.options import Metavar, Positional
from dia_diffusion.validation import Strict

DESCRIPTION = "Measures what the attention unit of trained runs does."


class RunOptions(Strict):
    runs: Annotated[tuple[str, ...], Positional("RUN")]
    """Run folders."""
    out: Path = Path("analysis")
    """The folder of the figure and its numbers."""
    data: Annotated[str | None, Metavar("SOURCE")] = None
    """The runs' images, where they are no longer at data.source."""
    steps: list[int] | None = None
    """Of the runs, such as 2000,24000; all that are kept if not given."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides images, times and noise."""


class ImageOptions(RunOptions):
    images: int = Field(64, ge=2)
    """Images of the training data to average over."""
    times: int = Field(16, ge=2)
    """Times, distributed as in training; a classifier has none."""


class MapsOptions(ImageOptions):
    """Measures the attention map over depth, times, classes, images and training."""


class CorrelationOptions(ImageOptions):
    """Measures how alike the attention maps of two blocks are, image by image (Fig. 2)."""


class ImportanceOptions(ImageOptions):
    """Measures by random forests which earlier blocks predict a block's attention map (Fig. 11)."""

    samples: int = Field(20_000, ge=100)
    """To fit each forest on, and as many to score it on."""


class AblationsOptions(ImageOptions):
    """Measures the loss with the attention map replaced by its averages."""


class LinearityOptions(ImageOptions):
    """Measures how linear the MLPs are, and the loss with a straight line in place of each GELU."""


class GradientsOptions(RunOptions):
    """Measures the size of the loss's gradient at the outputs of blocks (Fig. 13)."""

    batches: int = Field(16, ge=2)
    """Batches whose gradients are computed."""
    batch_size: int | None = Field(None, ge=1)
    """Images per batch; the run's own if not given."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged, or the raw ones of checkpoints."""


class GradientNoiseOptions(GradientsOptions):
    """Measures how noisy the gradients of a run's batches are."""

    batches: int = Field(64, ge=2)
    """Batches whose gradients are computed."""


class TrialOptions(Strict):
    config: str = "digits_uvit_cpu"
    """The recipe: a YAML file, or a shipped one's name."""
    out: Path = Path("analysis")
    """The folder of figure, numbers and trainings."""
    data: Annotated[str | None, Metavar("SOURCE")] = None
    """The images to train on; if not given, the recipe's data.source."""
    held_out: Annotated[str | None, Metavar("SOURCE")] = None
    """The images to measure; if not given, the test part of those."""
    images: int = Field(256, ge=2)
    """Held-out images to measure the loss on, at most."""
    times: int = Field(8, ge=1)
    """Times to measure it at, distributed as in training."""
    seeds: list[int] = Field([0, 1, 2])
    """Of first weights, images, times and noise."""
    plan: bool = False
    """Only print what is there and what is missing."""


class StabilityOptions(TrialOptions):
    """Trains units in networks with a part taken out, at growing learning rates."""

    steps: int = Field(400, ge=1)
    """Of each training."""
    units: list[str] = Field(["none", "dia-lstm", "dia-lstm-light", "se-individual"])
    """Attention units; NAME-individual has one per block."""
    variants: list[str] = Field(["as-is", "no-long-skips", "no-residuals", "no-layer-norm"])
    """What is taken out of the network."""
    learning_rates: list[float] = Field([1e-3, 3e-3, 1e-2, 3e-2])
    """Each constant from the first step on."""
    batch_size: int = 4
    """Images per optimizer step."""


class PlacementOptions(TrialOptions):
    """Trains a unit in the first blocks only, and in all but one part's."""

    steps: int = Field(1500, ge=1)
    """Of each training."""
    unit: str = "dia-lstm"
    """NAME-individual has parameters of its own for each block."""
    protocol: Annotated[str | None, Metavar("NAME")] = None
    """Also measure distances, by this protocol, such as fd-digits."""


def _in(module: str, name: str) -> Callable[[Any], None]:
    """The function of that name, whose module is imported when it is called, since it imports torch."""

    def run(options: Any) -> None:
        getattr(importlib.import_module(f"dia_diffusion.cli.{module}"), name)(options)

    return run


PARTS = {
    "maps": (MapsOptions, _in("analyses", "maps")),
    "correlation": (CorrelationOptions, _in("analyses", "correlation")),
    "importance": (ImportanceOptions, _in("analyses", "importance")),
    "gradients": (GradientsOptions, _in("analyses", "gradients")),
    "ablations": (AblationsOptions, _in("analyses", "ablations")),
    "linearity": (LinearityOptions, _in("analyses", "linearity")),
    "gradient-noise": (GradientNoiseOptions, _in("analyses", "gradient_noise")),
    "stability": (StabilityOptions, _in("trials", "stability")),
    "placement": (PlacementOptions, _in("trials", "placement")),
}
