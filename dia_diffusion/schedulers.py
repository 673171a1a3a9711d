"""What sampling needs to know about diffusers' schedulers: their process, noise levels, timesteps and noise."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Generator, Tensor

from dia_diffusion.errors import InputError
from dia_diffusion.predictions import convert_prediction

NUM_TIMESTEPS = 1000


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler runs the flow, x_t = (1 - t) x_0 + t noise at timestep 1000 t."""
    config, kinds = scheduler.config, (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)
    straight = isinstance(scheduler, kinds) or bool(config.get("use_flow_sigmas"))
    return straight and config.get("num_train_timesteps") == NUM_TIMESTEPS and not config.get("invert_sigmas")


def scheduler_prediction_type(scheduler: SchedulerMixin) -> str | None:
    """The prediction type that a scheduler expects, as a name in PREDICTION_TYPES; None if it doesn't say."""
    name = scheduler.config.get("prediction_type")
    return "velocity" if is_flow(scheduler) and name in (None, "flow_prediction") else name


def noise_ratio(scheduler: SchedulerMixin) -> Callable[[Tensor], Tensor]:
    """A function from timesteps of any shape to sigma / alpha, float32 on the timesteps' device.

    A scheduler without a table of betas may provide it as a method.

    Raises InputError: the scheduler doesn't say which process it runs.
    """
    if is_flow(scheduler):
        return lambda timestep: timestep / (NUM_TIMESTEPS - timestep)
    if hasattr(scheduler, "noise_ratio"):
        return scheduler.noise_ratio
    if not hasattr(scheduler, "alphas_cumprod"):
        raise InputError(f"the scheduler must give alphas_cumprod, got a {type(scheduler).__name__}")
    ratios = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()  # at whole timesteps
    ratios_on = cache(ratios.to)  # one copy to the device for all steps

    def ratio(timestep: Tensor) -> Tensor:
        below, table = timestep.long(), ratios_on(timestep.device)
        return torch.lerp(table[below], table[(below + 1).clamp(max=len(table) - 1)], (timestep - below).to(table))

    return ratio


def prediction_converter(
    given: str | None, scheduler: SchedulerMixin
) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """(prediction, x_t, timestep) -> the prediction as the scheduler expects it; None if no conversion is needed.

    given: the prediction type of the network, which has the scheduler's process.
    """
    taken = scheduler_prediction_type(scheduler)
    if given is None or taken is None or given == taken:
        return None
    if is_flow(scheduler):

        def convert_on_flow(prediction: Tensor, sample: Tensor, timestep: Tensor) -> Tensor:
            t = timestep / NUM_TIMESTEPS
            return convert_prediction(prediction, sample, 1 - t, t, given, taken)

        return convert_on_flow
    ratio_at = noise_ratio(scheduler)

    def convert(prediction: Tensor, sample: Tensor, timestep: Tensor) -> Tensor:
        ratio = ratio_at(timestep)
        alpha = (1 + ratio**2).rsqrt()
        return convert_prediction(prediction, sample, alpha, alpha * ratio, given, taken)

    return convert


def set_timesteps(scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device | None = None) -> None:
    """Sets the timesteps at which the network is called; on the flow they are 1000 sigma."""
    # Even steps from 1 to 0, as diffusers' pipelines pass them to Euler's scheduler. By default the schedulers end with
    # a step from 1/1000, where the velocity that a predicted image implies has a thousand times the image's error.
    sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=sigmas.tolist(), device=device)
    else:
        scheduler.set_timesteps(num_inference_steps, device=device)
    if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):  # it doesn't accept sigmas
        shift = scheduler.config.shift
        shifted = torch.from_numpy(shift * sigmas / (1 + (shift - 1) * sigmas)).float()
        scheduler.sigmas = torch.cat([shifted[:1], shifted[1:].repeat_interleave(2), torch.zeros(1)])
        scheduler.timesteps = NUM_TIMESTEPS * scheduler.sigmas[:-1].to(device)
    if is_flow(scheduler):
        # Some schedulers keep sigmas on the GPU and wait for it in each step.
        scheduler.sigmas = scheduler.sigmas.cpu()
        if scheduler.config.get("use_flow_sigmas"):  # diffusers rounds these timesteps to whole numbers
            scheduler.timesteps = NUM_TIMESTEPS * scheduler.sigmas[:-1].to(device)


def step_noise(
    scheduler: SchedulerMixin, index: int, sample: Tensor, generator: Generator | list[Generator] | None
) -> dict[str, Any]:
    """The arguments of `scheduler.step` that decide its noise: precomputed noise, a generator, or nothing.

    Either way the step uses the same numbers. A scheduler copies its CPU noise to the GPU with a call that waits until
    the GPU has finished the network call; copying precomputed noise doesn't wait, so the next call can be queued.

    Args:
        scheduler: with timesteps set.
        index: of the step.
        sample: (B, C, H, W), the step's input.
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
    """The dtype of this step's noise; None if the scheduler draws none or doesn't accept precomputed noise.

    DDIM accepts it too, but adds noise only for an eta above 0, which UViTPipeline doesn't pass.
    """
    name = type(scheduler).__name__
    if name == "DPMSolverMultistepScheduler" and scheduler.config.algorithm_type.startswith("sde"):
        return torch.float32
    if name == "EulerMaruyamaScheduler" and index + 1 < len(scheduler.timesteps):
        return sample.dtype
    return None
