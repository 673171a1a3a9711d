"""The noise of a stochastic sampler's steps, one generator per image, without waiting for the device."""

import inspect
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Generator, Tensor


def step_noise(
    scheduler: SchedulerMixin, index: int, sample: Tensor, generator: Generator | list[Generator] | None
) -> dict[str, Any]:
    """The arguments of `scheduler.step` that decide its noise: ready noise, the generator to draw it from, or none.

    Either way the step draws the same numbers. A scheduler copies its CPU noise to a GPU by a call that waits until the
    GPU has finished the network's; the copy of ready noise doesn't wait, so that the next call can be queued.

    Args:
        scheduler: with timesteps set.
        index: of the step.
        sample: (B, C, H, W), what the step is given.
        generator: one, or one per image.
    """
    accepted = inspect.signature(scheduler.step).parameters
    if "generator" not in accepted:
        return {}
    generators = generator if isinstance(generator, list) else [generator]
    on_cpu = all(each is not None and each.device.type == "cpu" for each in generators)
    dtype = _ready_noise_dtype(scheduler, index, sample)
    if dtype is None or not on_cpu:
        return {"generator": generator}
    noise = torch.empty(sample.shape, dtype=dtype, pin_memory=sample.device.type == "cuda")
    for part, each in zip(noise.chunk(len(generators)), generators, strict=True):
        part.normal_(generator=each)
    return {"variance_noise": noise.to(sample.device, non_blocking=True)}


def _ready_noise_dtype(scheduler: SchedulerMixin, index: int, sample: Tensor) -> torch.dtype | None:
    """What the scheduler draws this step's noise in; None where it draws none or takes none ready.

    DDIM takes it too, but adds noise only for an eta above 0, which UViTPipeline doesn't pass.
    """
    name = type(scheduler).__name__
    if name == "DPMSolverMultistepScheduler" and scheduler.config.algorithm_type.startswith("sde"):
        return torch.float32
    if name == "EulerMaruyamaScheduler" and index + 1 < len(scheduler.timesteps):
        return sample.dtype
    return None
