"""What of the attention map h a trained model needs: its loss with h replaced by what h is on average.

A mean over images can't know the image any more; one over times nor the time, one over channels nor the channel. The
network itself stays: it was trained with its own h, so this tells what it uses, not what it could do without.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dia_diffusion.analysis.attention_maps import MapMoments, measure_maps
from dia_diffusion.analysis.losses import compared, losses
from dia_diffusion.analysis.trained_run import TrainedRun
from dia_diffusion.attention.recalibration import recalibrate

# what h still depends on -> the axes of its mean over images (L, T, N) that it is averaged over as well
REPLACEMENTS: dict[str, tuple[int, ...]] = {
    "h by block, time, channel": (),
    "h by block, channel": (1,),
    "h by block, time": (2,),
    "h by block": (1, 2),
}


def replacement(moments: MapMoments, axes: tuple[int, ...]) -> Tensor:
    """The map (T, L, N), float32, in h's place: its mean over images and over these axes of (L, T, N)."""
    mean = moments.mean.mean(axis=axes, keepdims=True)
    return torch.from_numpy(np.broadcast_to(mean, moments.mean.shape).copy()).float().transpose(0, 1)


@contextmanager
def replaced_maps(unit: nn.Module, maps: Tensor) -> Iterator[None]:
    """While it lasts, the unit multiplies the features in each block with its row of maps (L, N) instead of h."""
    calls = count()

    def replace(unit: nn.Module, given: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        features = given[0]
        return recalibrate(features, maps[next(calls) % len(maps)].to(features)), output[1]

    hook = unit.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _in_turn(unit: nn.Module, maps: Tensor) -> Callable[[int], AbstractContextManager[None]]:
    """Time's index -> the replacement by that row of maps (T, L, N)."""
    return lambda time: replaced_maps(unit, maps[time])


def ablations_of_run(
    run: TrainedRun,
    steps: Sequence[int] | None = None,
    *,
    num_images: int,
    num_times: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda images: None,
) -> dict[str, Any]:
    """A run's record: the loss of each step's averaged weights with their own h and with each replacement.

    The means are those of num_images images, the losses those of as many others, at the same times.

    Raises:
        InputError: the run has no unit, too few images, or no pipeline of a step.
    """
    run.require_unit()
    draws = run.draw_others(seed, num_images)
    measured = []
    for step in run.choose_steps(steps):
        model = run.averaged_model(step)
        assert model.unit is not None
        moments = measure_maps(run, model, num_images=num_images, num_times=num_times, seed=seed, progress=progress)
        own = losses(run, model, draws, num_times, progress=progress)
        replaced = {}
        for name, axes in REPLACEMENTS.items():
            during = _in_turn(model.unit, replacement(moments, axes))
            replaced[name] = losses(run, model, draws, num_times, during, progress=progress)
        seen = step * run.experiment.train.batch_size
        measured.append({"step": step, "images_seen": seen, "losses": compared(own, replaced)})
    return {**run.described(), "steps": measured}
