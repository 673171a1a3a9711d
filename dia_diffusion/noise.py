"""Noise processes in closed form: the only definition of alpha, sigma, targets and loss weights.

    x_t = alpha(t) x_0 + sigma(t) noise

Training mixes images with noise here, and pipelines get the scheduler that runs the same process backwards. The time
that the network gets is called network time: 999 t for the continuous VP process (t in [0, 1]), the step 0..999 for the
discrete ones, 1000 t for the flow. Recipes choose from four tables: PROCESSES, PREDICTION_TYPES, LOSS_WEIGHTINGS, and
TIMES in dia_diffusion/times.py.

Functions of time alone are computed in float64 on the CPU and copied to the device in the sample's dtype: some devices,
such as Apple's MPS, have no float64, and this doesn't wait for a CUDA GPU.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from dia_diffusion.errors import InputError
from dia_diffusion.predictions import LOSS_WEIGHTINGS, PREDICTION_TYPES
from dia_diffusion.registry import Registry
from dia_diffusion.schedulers import NUM_TIMESTEPS, is_flow
from dia_diffusion.times import TIMES, check_arguments, quantiles

BETA_MIN, BETA_MAX = 0.1, 20.0  # of the VP-SDE (Song et al. 2021, appendix C), as U-ViT uses it
# At t = 0 the signal-to-noise ratio is infinite, which no table of betas can hold.
SMALLEST_TABLE_TIME = 1e-4
# If a flow's network predicts the image, the velocity error is the image error divided by t. t is clamped to at least
# this, as in JiT (Li and He 2025, arXiv 2511.13720).
SMALLEST_LOSS_TIME = 0.05


class Process(ABC):
    """How images turn into noise; PROCESSES holds one object of each subclass.

    prediction_types: what its networks may predict, as names in PREDICTION_TYPES.
    loss_type: the prediction type in which errors are weighted, whatever the network predicts; None: the network's own.
    scheduler_class: the scheduler that its pipelines are saved with, diffusers' or another SchedulerMixin.
    scheduler_settings: settings of that scheduler that say how it steps.
    """

    prediction_types: tuple[str, ...]
    loss_type: str | None = None
    scheduler_class: type[SchedulerMixin]
    scheduler_settings: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """Network times (B,) of t (B,) in [0, 1)."""

    @abstractmethod
    def alpha_sigma(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma (B,), float64 on the CPU, at network times (B,)."""

    def snr(self, timestep: Tensor) -> Tensor:
        """Signal-to-noise ratios alpha^2 / sigma^2 (B,), float64 on the CPU, at network times (B,)."""
        alpha, sigma = self.alpha_sigma(timestep)
        return (alpha / sigma) ** 2

    def log_ratio(self, timestep: Tensor) -> Tensor:
        """log(sigma / alpha) (B,), float64 on the CPU, at network times (B,)."""
        alpha, sigma = self.alpha_sigma(timestep)
        return sigma.log() - alpha.log()

    def time_at(self, log_ratio: Tensor) -> Tensor:
        """t (B,) in [0, 1), float32, at log(sigma / alpha) (B,), to within 2^-24, clamped to the process's ends."""
        low, high = torch.zeros_like(log_ratio), torch.ones_like(log_ratio)
        for _ in range(24):
            middle = (low + high) / 2
            above = self.log_ratio(self.network_time(middle)) > log_ratio
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return low.float()

    def scheduler_config(self, prediction_type: str) -> dict[str, Any]:
        """The scheduler's settings that define the process."""
        return {}

    def build_scheduler(self, prediction_type: str) -> SchedulerMixin:
        """The scheduler that pipelines of this process are saved with."""
        return self.scheduler_class(**self.scheduler_config(prediction_type), **self.scheduler_settings)

    def is_run_by(self, scheduler: SchedulerMixin) -> bool:
        """Whether a pipeline's scheduler runs this process."""
        wanted = self.scheduler_config(scheduler.config.get("prediction_type", "epsilon"))
        same = all(scheduler.config.get(key) == value for key, value in wanted.items())
        return isinstance(scheduler, self.scheduler_class) and same


class VPProcess(Process):
    """A variance-preserving process, alpha^2 + sigma^2 = 1, which schedulers define by its betas."""

    prediction_types = ("epsilon", "sample", "v_prediction")
    scheduler_class = DPMSolverMultistepScheduler
    scheduler_settings = MappingProxyType({"solver_order": 2, "use_lu_lambdas": True})  # as in sampler "dpmsolver++"

    @abstractmethod
    def log_alpha_bar(self, timestep: Tensor) -> Tensor:
        """log alpha^2 (B,), float64 on the CPU, at network times (B,)."""

    @cached_property
    @abstractmethod
    def betas(self) -> Tensor:
        """beta (1000,), float64, with prod(1 - beta) = alpha^2 at the network times 0..999."""

    def alpha_sigma(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha_bar = self.log_alpha_bar(timestep)
        return (0.5 * log_alpha_bar).exp(), (-torch.expm1(log_alpha_bar)).sqrt()

    def snr(self, timestep: Tensor) -> Tensor:
        return 1 / torch.expm1(-self.log_alpha_bar(timestep))

    def scheduler_config(self, prediction_type: str) -> dict[str, Any]:
        """The settings with which any scheduler based on betas runs this process backwards."""
        return {
            "num_train_timesteps": NUM_TIMESTEPS,
            "trained_betas": self.betas.tolist(),
            "prediction_type": prediction_type,
        }

    def is_run_by(self, scheduler: SchedulerMixin) -> bool:
        betas = getattr(scheduler, "betas", scheduler.config.get("trained_betas"))
        if betas is None or len(betas) != NUM_TIMESTEPS or scheduler.config.get("snr_shift_scale", 1) != 1:
            return False
        if is_flow(scheduler):
            return False
        # The tolerance allows for betas that were rounded to float32.
        return torch.allclose(torch.as_tensor(betas, dtype=torch.float64), self.betas, rtol=1e-4, atol=1e-7)


def vp_log_alpha_bar(t: Tensor) -> Tensor:
    """log alpha^2 of the continuous VP process at t in [0, 1]: minus the integral of beta from 0 to t."""
    return -(BETA_MIN * t + 0.5 * (BETA_MAX - BETA_MIN) * t**2)


class ContinuousVP(VPProcess):
    """The VP-SDE with beta 0.1..20 (Song et al. 2021) in continuous time."""

    def network_time(self, t: Tensor) -> Tensor:
        return t * (NUM_TIMESTEPS - 1)

    def log_alpha_bar(self, timestep: Tensor) -> Tensor:
        return vp_log_alpha_bar(timestep.cpu().double() / (NUM_TIMESTEPS - 1))

    @cached_property
    def betas(self) -> Tensor:
        t = torch.arange(NUM_TIMESTEPS, dtype=torch.float64) / (NUM_TIMESTEPS - 1)
        log_alpha_bar = vp_log_alpha_bar(t.clamp(min=SMALLEST_TABLE_TIME))
        return -torch.expm1(torch.diff(log_alpha_bar, prepend=torch.zeros(1, dtype=torch.float64)))


class DiscreteVP(VPProcess):
    """1,000 steps of given betas."""

    def __init__(self, build_betas: Callable[[], Tensor]):
        self.build_betas = build_betas

    def network_time(self, t: Tensor) -> Tensor:
        return (t * NUM_TIMESTEPS).long()

    def log_alpha_bar(self, timestep: Tensor) -> Tensor:
        return torch.log1p(-self.betas).cumsum(0)[timestep.cpu()]

    @cached_property
    def betas(self) -> Tensor:
        return self.build_betas()


def linear_betas() -> Tensor:
    """The linear schedule of Ho et al. 2020."""
    return torch.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=torch.float64)


def cosine_betas() -> Tensor:
    """The cosine schedule of Nichol and Dhariwal 2021."""
    edges = torch.arange(NUM_TIMESTEPS + 1, dtype=torch.float64) / NUM_TIMESTEPS
    alpha_bar = ((edges + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


class Flow(Process):
    """Rectified flow (Liu et al. 2023, Lipman et al. 2023): straight lines from images to noise."""

    prediction_types = ("velocity", "sample")
    loss_type = "velocity"
    scheduler_class = FlowMatchEulerDiscreteScheduler

    def network_time(self, t: Tensor) -> Tensor:
        return t * NUM_TIMESTEPS

    def alpha_sigma(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        t = timestep.cpu().double() / NUM_TIMESTEPS
        return 1 - t, t

    def time_at(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.sigmoid().float().clamp(max=1 - 2**-24)

    def scheduler_config(self, prediction_type: str) -> dict[str, Any]:
        return {"num_train_timesteps": NUM_TIMESTEPS}

    def is_run_by(self, scheduler: SchedulerMixin) -> bool:
        return is_flow(scheduler)


PROCESSES: Registry[Process] = Registry("noise process")
PROCESSES.register("vp-continuous", ContinuousVP())
PROCESSES.register("ddpm-linear", DiscreteVP(linear_betas))
PROCESSES.register("cosine", DiscreteVP(cosine_betas))
PROCESSES.register("flow", Flow())


@dataclass(frozen=True)
class NoiseProcess:
    """A recipe's noise: the process, what the network predicts, and how errors and times are weighted.

    Args:
        schedule: a name in PROCESSES.
        prediction_type: a name in PREDICTION_TYPES that the process supports.
        loss_weighting: a name in LOSS_WEIGHTINGS.
        times: a name in TIMES.
        times_kwargs: arguments of that distribution.
        shift: multiplies sigma / alpha at the times that are drawn; above 0. On the flow it maps t to
            s t / (1 + (s - 1) t) (Esser et al. 2024, equation 23), and samplers step evenly in the shifted time.

    Raises:
        InputError: an unknown name or argument, or a prediction type that the process doesn't support.
    """

    schedule: str = "vp-continuous"
    prediction_type: str = "epsilon"
    loss_weighting: str = "uniform"
    times: str = "uniform"
    times_kwargs: Mapping[str, Any] | None = None
    shift: float = 1.0

    def __post_init__(self) -> None:
        process = PROCESSES.choose(self.schedule, "noise.schedule")
        if self.prediction_type not in process.prediction_types:
            accepted = ", ".join(process.prediction_types)
            raise InputError(
                f"`noise.prediction_type` must be one of {accepted} for noise.schedule {self.schedule}, got "
                f"{self.prediction_type!r}"
            )
        LOSS_WEIGHTINGS.choose(self.loss_weighting, "noise.loss_weighting")
        TIMES.choose(self.times, "noise.times")
        check_arguments(self.times, self.times_kwargs or {})

    @property
    def process(self) -> Process:
        return PROCESSES[self.schedule]

    def timestep(self, uniform: Tensor) -> Tensor:
        """Network times (B,) from numbers drawn uniformly from [0, 1)."""
        t = quantiles(self.times, uniform, self.process, self.times_kwargs or {})
        if self.shift != 1:
            t = self.process.time_at(self.process.log_ratio(self.process.network_time(t)) + math.log(self.shift))
        return self.process.network_time(t)

    def mix(self, sample: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy sample x_t and the network's target, both like sample (B, C, H, W).

        timestep: (B,), on the CPU, to avoid waiting for the device.
        """
        factors = torch.stack(self.process.alpha_sigma(timestep)).to(sample.dtype)  # (2, B)
        if sample.is_cuda:
            factors = factors.pin_memory()  # a copy from pageable memory would wait for the GPU's earlier work
        alpha, sigma = factors.to(sample.device, non_blocking=sample.is_cuda)[..., None, None, None]
        target = PREDICTION_TYPES[self.prediction_type].target(sample, noise, alpha, sigma)
        return alpha * sample + sigma * noise, target

    def loss_weight(self, timestep: Tensor) -> Tensor:
        """Weights (B,), float32 on the CPU, of the squared errors at network times (B,)."""
        weights, snr = LOSS_WEIGHTINGS[self.loss_weighting], self.process.snr(timestep)
        kind, loss_type = PREDICTION_TYPES[self.prediction_type], self.process.loss_type
        if loss_type in (None, self.prediction_type):
            return weights(snr, kind).float()
        snr = snr.clamp(max=(1 / SMALLEST_LOSS_TIME - 1) ** 2)
        weighted = PREDICTION_TYPES[loss_type]
        return (weights(snr, weighted) * weighted.error_scale(snr) / kind.error_scale(snr)).float()

    def scheduler_config(self) -> dict[str, Any]:
        """The settings that define this process in any scheduler."""
        return self.process.scheduler_config(self.prediction_type)

    def build_scheduler(self) -> SchedulerMixin:
        """The scheduler that pipelines of this process and prediction type are saved with."""
        scheduler = self.process.build_scheduler(self.prediction_type)
        if self.shift != 1 and is_flow(scheduler):
            return type(scheduler).from_config(scheduler.config, shift=self.shift)
        return scheduler
