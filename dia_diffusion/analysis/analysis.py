"""The parts of an analysis of trained runs: what it measures, draws and prints."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.figure
import numpy as np
import numpy.typing as npt
from torch import nn

from dia_diffusion.analysis.run import DEFAULT_COVERAGE, Coverage, TrainedRun
from dia_diffusion.errors import InputError
from dia_diffusion.figures import Figure

Record = dict[str, Any]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def quantiles(histogram: npt.NDArray[np.int64], lowest: float, highest: float) -> dict[str, float] | None:
    """QUANTILES of a histogram with equal bins, accurate to one bin; None if it is empty."""
    if not histogram.any():
        return None
    below = np.concatenate([[0], np.cumsum(histogram)]) / histogram.sum()
    edges = np.linspace(lowest, highest, len(histogram) + 1)
    return {str(q): float(np.interp(q, below, edges)) for q in QUANTILES}


@dataclass(frozen=True)
class Analysis:
    """An analysis of trained runs. `over` is a Coverage or GradientBatches."""

    measure: Callable[[TrainedRun, nn.Module, Any], Record]
    """(run, network of a step, over) -> the record's fields for the step."""
    draw: Callable[[Sequence[Record]], Figure | matplotlib.figure.Figure]
    """The records of runs -> the figure."""
    describe: Callable[[Record], Iterator[str]]
    """Lines of text about the last step of a run's record."""
    about: Callable[[TrainedRun, Any], Record] = lambda run, over: {}
    """(run, over) -> the record's fields for the whole run."""
    choose_steps: Callable[[TrainedRun, Sequence[int] | None, str], list[int]] = TrainedRun.with_first
    """(run, requested steps or None, weights) -> the steps to measure."""
    needs_unit: bool = True
    passes: int = 1
    """Passes over all images and times per step."""
    held_out: bool = False
    """Whether fits on the drawn images are evaluated on an equal number of other images."""

    def of_run(
        self, run: TrainedRun, steps: Sequence[int] | None = None, over: Any = DEFAULT_COVERAGE, weights: str = "ema"
    ) -> Record:
        """A run's record.

        steps: None lets the analysis choose among the steps with saved weights.
        weights: "ema", the averaged weights, or "raw", the trained ones.

        Raises:
            InputError: the run has no unit or too few images, or no weights of a step.
        """
        chosen = self.check(run, steps, over, weights)
        measured = [
            {"step": step, "images_seen": step * run.batch_size, **self.measure(run, run.model(step, weights), over)}
            for step in chosen
        ]
        return {**run.described(), **self.about(run, over), "steps": measured}

    def check(self, run: TrainedRun, steps: Sequence[int] | None, over: Any, weights: str = "ema") -> list[int]:
        """The steps to measure. Raises InputError as `of_run` does."""
        if self.needs_unit and run.unit == "none":
            raise InputError(f"{run.folder.path} was trained without attention unit; this analysis needs one")
        most = len(run.images) // (2 if self.held_out else 1)
        if isinstance(over, Coverage) and over.num_images > most:
            part = "half of " if self.held_out else ""
            where = f"{part}the {len(run.images):,} images of {run.folder.path}"
            raise InputError(f"`--images` must be {most:,} or fewer, {where}, got {over.num_images:,}")
        return self.choose_steps(run, steps, weights)
