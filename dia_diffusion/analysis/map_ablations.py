"""What of the attention map h a trained model needs: its loss with h replaced by what h is on average.

A mean over images can't know the image any more; one over times nor the time, one over channels nor the channel. The
network itself stays: it was trained with its own h, so this tells what it uses, not what it could do without.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dia_diffusion.analysis.attention_maps import measure_maps
from dia_diffusion.analysis.losses import compared, losses
from dia_diffusion.analysis.map_moments import MapMoments
from dia_diffusion.analysis.stages import attended_stages
from dia_diffusion.analysis.trained_run import DEFAULT_COVERAGE, Coverage, TrainedRun
from dia_diffusion.attention.layers import recalibrate

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
def replaced_maps(units: Sequence[nn.Module], maps: Sequence[Tensor]) -> Iterator[None]:
    """While it lasts, each unit multiplies the features in each of its blocks with a row of its (L, N) instead of h."""
    with ExitStack() as hooks:
        for unit, rows in zip(units, maps, strict=True):
            hooks.callback(unit.register_forward_hook(partial(_replace, cycle(rows))).remove)
        yield


def _replace(
    rows: Iterator[Tensor], unit: nn.Module, given: tuple[Any, ...], output: tuple[Tensor, Any]
) -> tuple[Tensor, Any]:
    features = given[0]
    return recalibrate(features, next(rows).to(features)), output[1]


def _in_turn(units: Sequence[nn.Module], maps: Sequence[Tensor]) -> Callable[[int], AbstractContextManager[None]]:
    """Time's index -> the replacement by that row of each unit's maps (T, L, N)."""
    return lambda time: replaced_maps(units, [each[time] for each in maps])


def ablations_of_run(
    run: TrainedRun, steps: Sequence[int] | None = None, coverage: Coverage = DEFAULT_COVERAGE
) -> dict[str, Any]:
    """A run's record: the loss of each step's averaged weights with their own h and with each replacement.

    The means are those of the covered images, the losses those of as many others, at the same times.

    Raises:
        InputError: the run has no unit, too few images, or no weights of a step.
    """
    run.require_unit()
    draws = run.draw_others(coverage.seed, coverage.num_images)
    measured = []
    for step in run.choose_steps(steps):
        model = run.model(step)
        units = [stage.unit for stage in attended_stages(model) if stage.unit is not None]
        moments = measure_maps(run, model, coverage)
        own = losses(run, model, draws, coverage)
        replaced = {}
        for name, axes in REPLACEMENTS.items():
            during = _in_turn(units, [replacement(each, axes) for each in moments])
            replaced[name] = losses(run, model, draws, coverage, during)
        measured.append({**run.measured(step), "losses": compared(own, replaced)})
    return {**run.described(), "steps": measured}
