"""`dia-diffusion analyze`: what the attention unit of trained runs does, as figures and the numbers they show.

PARTS is the table of analyses: the options of each, and the module that has its function, record and figure.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from dia_diffusion.cli.console import ConsoleProgress, console
from dia_diffusion.cli.options import Metavar, Positional
from dia_diffusion.errors import InputError
from dia_diffusion.validation import Strict

if TYPE_CHECKING:
    from dia_diffusion.analysis.run import Coverage, GradientBatches

DESCRIPTION = "Measures what the attention unit of trained runs does."


class RunOptions(Strict):
    runs: Annotated[tuple[str, ...], Positional("RUN")]
    """Run folders."""
    out: Path = Path("analysis")
    """Folder for the figure and its numbers."""
    data: Annotated[str | None, Metavar("SOURCE")] = None
    """The runs' images, if they are no longer at data.source."""
    steps: list[int] | None = None
    """Steps of the runs, such as 2000,24000; all saved ones if not given."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of images, times and noise."""


class ImageOptions(RunOptions):
    unit: ClassVar = "images"
    weights: ClassVar = "ema"

    images: int = Field(64, ge=2)
    """Images of the training data to average over."""
    times: int = Field(16, ge=2)
    """Times, distributed as in training; a classifier has none."""

    def over(self, progress: Callable[[int], None]) -> "Coverage":
        """The images and times that the analysis covers."""
        from dia_diffusion.analysis.run import Coverage

        return Coverage(self.images, self.times, self.seed, progress=progress)


class MapsOptions(ImageOptions):
    """Measures the attention map over depth, times, classes, images and training."""


class CorrelationOptions(ImageOptions):
    """Measures how similar the attention maps of two blocks are, image by image (Fig. 2)."""


class ImportanceOptions(ImageOptions):
    """Measures with random forests which earlier blocks predict a block's attention map (Fig. 11)."""

    samples: int = Field(20_000, ge=100)
    """Samples to fit each forest on, and an equal number to score it on."""

    def over(self, progress: Callable[[int], None]) -> "Coverage":
        return replace(super().over(progress), num_samples=self.samples)


class AblationsOptions(ImageOptions):
    """Measures the loss with the attention map replaced by its averages."""


class LinearityOptions(ImageOptions):
    """Measures how linear the MLPs are, and the loss with a straight line in place of each GELU."""


class GradientsOptions(RunOptions):
    """Measures the size of the loss's gradient at the outputs of blocks (Fig. 13)."""

    unit: ClassVar = "batches"

    batches: int = Field(16, ge=2)
    """Batches whose gradients are computed."""
    batch_size: int | None = Field(None, ge=1)
    """Images per batch; the run's own if not given."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged weights, or the raw weights of checkpoints."""

    def over(self, progress: Callable[[int], None]) -> "GradientBatches":
        """The batches that the analysis covers."""
        from dia_diffusion.analysis.run import GradientBatches

        return GradientBatches(self.batches, self.batch_size, self.seed, progress)


class GradientNoiseOptions(GradientsOptions):
    """Measures how noisy the gradients of a run's batches are."""

    batches: int = Field(64, ge=2)
    """Batches whose gradients are computed."""


class TrialOptions(Strict):
    config: str = "digits_uvit_cpu"
    """The recipe: a YAML file, or a shipped one's name."""
    out: Path = Path("analysis")
    """Folder for the figure, numbers and training runs."""
    data: Annotated[str | None, Metavar("SOURCE")] = None
    """The images to train on; if not given, the recipe's data.source."""
    held_out: Annotated[str | None, Metavar("SOURCE")] = None
    """The images to measure the loss on; if not given, the test split of the training images."""
    images: int = Field(256, ge=2)
    """Maximum number of held-out images to measure the loss on."""
    times: int = Field(8, ge=1)
    """Times to measure the loss at, distributed as in training."""
    seeds: list[int] = Field([0, 1, 2])
    """Seeds of initial weights, images, times and noise."""
    jobs: int = Field(1, ge=1)
    """Parallel training processes, which share the cores or have a GPU each."""
    plan: bool = False
    """Only print what exists and what is missing."""


class StabilityOptions(TrialOptions):
    """Trains units in networks with a part removed, at increasing learning rates."""

    steps: int = Field(400, ge=1)
    """Steps of each training run."""
    units: list[str] = Field(["none", "dia-lstm", "dia-lstm-light", "se-individual"])
    """Attention units; NAME-individual has one per block."""
    variants: list[str] = Field(["as-is", "no-long-skips", "no-residuals", "no-layer-norm"])
    """Parts to remove from the network."""
    learning_rates: list[float] = Field([1e-3, 3e-3, 1e-2, 3e-2])
    """Learning rates, each constant from the first step on."""
    batch_size: int = 4
    """Images per optimizer step."""


class PlacementOptions(TrialOptions):
    """Trains a unit in only the first blocks, and in all blocks except those of one part."""

    steps: int = Field(1500, ge=1)
    """Steps of each training run."""
    unit: str = "dia-lstm"
    """The attention unit; NAME-individual has one per block."""
    protocol: Annotated[str | None, Metavar("NAME")] = None
    """Also measure distances, by this protocol, such as fd-digits."""


def analyze(name: str, module: str, options: ImageOptions | GradientsOptions) -> None:
    """Measures the runs, writes NAME.json and NAME.png, and prints the numbers of the last step."""
    import torch

    from dia_diffusion.analysis.analysis import Analysis
    from dia_diffusion.analysis.run import open_runs
    from dia_diffusion.io import write_json
    from dia_diffusion.plotting import save_figure
    from dia_diffusion.training.randomness import RANDOMNESS

    refuse_file(options.out)
    analysis: Analysis = importlib.import_module(f"dia_diffusion.analysis.{module}").ANALYSIS
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    done = total = 0
    with ConsoleProgress() as progress:
        runs = open_runs(options.runs, options.data, device, progress.reading("images"))

        def count(amount: int) -> None:
            nonlocal done
            done += amount
            progress.update(f"measuring {name}", options.unit, done, total)

        over = options.over(count)
        for run in runs:  # all are checked before the first is measured
            total += len(analysis.check(run, options.steps, over, options.weights)) * analysis.passes * over.work(run)
        records = [analysis.of_run(run, options.steps, over, options.weights) for run in runs]
    own = options.model_dump(exclude={*RunOptions.model_fields, "batch_size"})
    protocol = {**own, "weights": options.weights, "seed": options.seed, "randomness": RANDOMNESS}
    numbers, figure = options.out / f"{name}.json", options.out / f"{name}.png"
    write_json(numbers, {"analysis": name, "protocol": protocol, "runs": records})  # first, in case the figure fails
    save_figure(analysis.draw(records), figure, dpi=140)
    console.print(f"{figure}, numbers in {numbers}")
    for record in records:
        for line in analysis.describe(record):
            console.print(line)


def refuse_file(out: Path) -> None:
    """Raises InputError for an --out that can't be a folder."""
    if out.exists() and not out.is_dir():
        raise InputError(f"`--out` must be a folder, got {out}")


def _in(module: str, name: str) -> Callable[[Any], None]:
    """The named function of a module that is imported only when the function is called, since it imports torch."""

    def run(options: Any) -> None:
        getattr(importlib.import_module(f"dia_diffusion.cli.{module}"), name)(options)

    return run


PARTS: dict[str, tuple[type[Strict], Callable[[Any], None]]] = {
    "maps": (MapsOptions, partial(analyze, "maps", "attention_maps")),
    "correlation": (CorrelationOptions, partial(analyze, "correlation", "correlation")),
    "importance": (ImportanceOptions, partial(analyze, "importance", "importance")),
    "gradients": (GradientsOptions, partial(analyze, "gradients", "gradients")),
    "ablations": (AblationsOptions, partial(analyze, "ablations", "ablations")),
    "linearity": (LinearityOptions, partial(analyze, "linearity", "linearity")),
    "gradient-noise": (GradientNoiseOptions, partial(analyze, "gradient-noise", "gradient_noise")),
    "stability": (StabilityOptions, _in("trials", "stability")),
    "placement": (PlacementOptions, _in("trials", "placement")),
}
