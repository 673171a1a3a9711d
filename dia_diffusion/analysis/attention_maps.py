"""The attention map h over depth, time, image and channel: what a shared unit does in a diffusion model.

Is h an attention at all? Its variance is split by the law of total variance, over blocks l, channels n, times t and
images i, each value counting alike:

    Var(h) = Var_l E[h|l] + E_l Var_n E[h|l,n] + E_ln Var_t E[h|l,n,t] + E_lnt Var_i h
             blocks         channels             times                   images

A learned number a block could do what the first term does, a learned vector of channels a block the first two, and
such a vector that knows the time the first three. Only the last needs the features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dia_diffusion.analysis.trained_run import TrainedRun, blocks_of, spread
from dia_diffusion.errors import InputError
from dia_diffusion.models.uvit import UViT

SOURCES = ("blocks", "channels", "times", "images")
RANGE = (10, 90)  # percentiles over channels


@contextmanager
def captured_maps(unit: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the unit multiplies features with: one map that broadcasts to (B, N) a call."""
    maps: list[Tensor] = []
    hook = unit.register_forward_hook(lambda unit, _, output: maps.append(unit.attention_map(output[1])))
    try:
        yield maps
    finally:
        hook.remove()


@torch.no_grad()
def attention_maps(model: UViT, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
    """h (L, B, N), float32, of each of the L blocks for noisy samples (B, C, H, W) at network times (B,).

    Raises:
        InputError: the model has no unit.
    """
    if model.unit is None:
        raise InputError("the model has no attention unit, and so no attention maps")
    with captured_maps(model.unit) as maps:
        model(sample, timestep, class_labels)
    return torch.stack([h.to(sample.device, torch.float32).expand(len(sample), model.hidden_size) for h in maps])


@dataclass(frozen=True)
class MapMoments:
    """Mean and variance of h over images, each (L, T, N) float64: blocks, times, channels."""

    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]

    def split(self) -> dict[str, float]:
        """The four terms of the variance over all of h; their sum is the variance."""
        by_channel = self.mean.mean(axis=1)  # (L, N)
        return {
            "blocks": float(by_channel.mean(axis=1).var()),
            "channels": float(by_channel.var(axis=1).mean()),
            "times": float(self.mean.var(axis=1).mean()),
            "images": float(self.variance.mean()),
        }

    def block(self, index: int) -> "MapMoments":
        """Those of one block alone."""
        return MapMoments(self.mean[index : index + 1], self.variance[index : index + 1])


def measure_maps(
    run: TrainedRun,
    model: UViT,
    *,
    num_images: int,
    num_times: int,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda images: None,
) -> MapMoments:
    """The moments of h over the run's images, each with one noise, at times spread as training draws them.

    The images are the first that `seed` draws, with flips and dropped labels as in training. Only their noise is
    held for all of them at once.

    progress: called with how many more images the network has seen.
    """
    times = run.process.timestep(spread(num_times))
    draws = run.draw(seed, 0, num_images)
    shape = (len(blocks_of(model)), num_times, model.hidden_size)
    total, squares = np.zeros(shape), np.zeros(shape)
    for start in range(0, num_images, batch_size):
        part = draws.slice(start, min(start + batch_size, num_images))
        images, labels = run.batch(part)
        for index, time in enumerate(times):
            timestep = time.expand(len(images))
            noisy, _ = run.process.mix(images, part.noise.to(images), timestep)
            h = attention_maps(model, noisy, timestep.to(images.device), labels).double().cpu().numpy()  # (L, b, N)
            total[:, index] += h.sum(axis=1)
            squares[:, index] += np.square(h).sum(axis=1)
            progress(len(images))
    mean = total / num_images
    return MapMoments(mean, np.maximum(squares / num_images - mean**2, 0.0))


def summary(moments: MapMoments) -> dict[str, Any]:
    """The numbers of one step, for a record: means by block and time, the range over channels, shares of variance."""
    by_channel = moments.mean.mean(axis=1)  # (L, N)
    low, high = np.percentile(by_channel, RANGE, axis=1)
    terms = moments.split()
    blocks = [moments.block(index).split() for index in range(len(by_channel))]
    return {
        "mean": float(moments.mean.mean()),
        "variance": sum(terms.values()),
        "shares": _shares(terms),
        "mean_by_block": by_channel.mean(axis=1).tolist(),
        "low_by_block": low.tolist(),
        "high_by_block": high.tolist(),
        "mean_by_block_and_time": moments.mean.mean(axis=2).tolist(),
        "variance_by_block": [sum(block.values()) for block in blocks],
        "shares_by_block": [_shares(block) for block in blocks],
    }


def maps_of_run(
    run: TrainedRun,
    steps: Sequence[int] | None = None,
    *,
    num_images: int,
    num_times: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda images: None,
) -> dict[str, Any]:
    """A run's record: the summary of each step's averaged weights, and of the first weights where all steps are meant.

    Raises:
        InputError: the run has no unit, or no pipeline of a step.
    """
    run.require_unit()
    measured = []
    for step in steps_of_maps(run, steps):
        model = run.first_model() if step == 0 else run.averaged_model(step)
        moments = measure_maps(run, model, num_images=num_images, num_times=num_times, seed=seed, progress=progress)
        measured.append({"step": step, "images_seen": step * run.experiment.train.batch_size} | summary(moments))
    return {**run.described(), "steps": measured}


def steps_of_maps(run: TrainedRun, steps: Sequence[int] | None) -> list[int]:
    """The steps that `maps_of_run` measures; 0 stands for the first weights."""
    first = [0] if steps is None and run.experiment.init_from is None else []
    return first + run.choose_steps(steps)


def _shares(terms: dict[str, float]) -> dict[str, float]:
    whole = sum(terms.values())
    return {name: term / whole if whole else 0.0 for name, term in terms.items()}
