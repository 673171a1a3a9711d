"""A run's loss with its network as it is and with a part replaced, on the same images, times and noise."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from dia_diffusion.analysis.trained_run import TrainedRun, spread
from dia_diffusion.models.uvit import UViT
from dia_diffusion.training.objective import image_losses
from dia_diffusion.training.randomness import StepDraws


@torch.no_grad()
def losses(
    run: TrainedRun,
    model: UViT,
    draws: StepDraws,
    num_times: int,
    during: Callable[[int], AbstractContextManager[object]] = lambda time: nullcontext(),
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda images: None,
) -> Tensor:
    """The run's own loss (T, I), float64, of each image of the draws with its noise at each of T spread times.

    during: what is replaced while the network runs at the time of that index.
    progress: called with how many more images the network has seen.
    """
    count = len(draws.indices)
    found = torch.empty(num_times, count, dtype=torch.float64)
    for start in range(0, count, batch_size):
        part = draws.slice(start, min(start + batch_size, count))
        images, labels = run.batch(part)
        for index, uniform in enumerate(spread(num_times)):
            at_time = replace(part, uniform=uniform.expand(len(images)))
            with during(index):
                weighted = image_losses(model, run.process, images, at_time, labels)
            found[index, start : start + len(images)] = weighted.cpu()
            progress(len(images))
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
