"""A run's loss with its network as it is and with a part replaced, on the same images, times and noise."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dia_diffusion.analysis.trained_run import Coverage, TrainedRun


@torch.no_grad()
def losses(
    run: TrainedRun,
    model: nn.Module,
    draws: Any,
    coverage: Coverage,
    during: Callable[[int], AbstractContextManager[object]] = lambda time: nullcontext(),
) -> Tensor:
    """The run's own loss (T, I), float64, of each image of the draws with its noise at each of T spread times.

    during: what is replaced while the network runs at the time of that index.
    """
    num_times = run.num_times(coverage.num_times)
    found = torch.empty(num_times, len(draws.indices), dtype=torch.float64)
    for batch in run.batches(draws, num_times, coverage.batch_size):
        with during(batch.time):
            found[batch.time, batch.images] = batch.losses(model).cpu().double()
        coverage.progress(batch.images.stop - batch.images.start)
    return found


def compared(own: Tensor, replaced: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """For a record: the mean of each name's losses (T, I), and its difference to `own`, with standard errors.

    An image's loss is its mean over times, and the errors are those of a mean over images, so the difference's, which
    is taken image by image, is far smaller than the losses'.
    """
    before = own.mean(0)
    record = {}
    for name, each in {"own": own, **replaced}.items():
        by_image = each.mean(0)
        loss, error = _mean(by_image)
        difference, difference_error = _mean(by_image - before)
        record[name] = {
            "loss": loss,
            "standard_error": error,
            "difference": difference,
            "difference_error": difference_error,
        }
    return record


def _mean(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))
