"""Samplers by name: rows of a table over diffusers' schedulers, each with the settings that suit the VP process.

Near t = 0 the process's log signal-to-noise ratio changes by more in one timestep than elsewhere in a hundred. Solvers
of higher order extrapolate over a step, so they step evenly in that ratio. Solvers of first order and ancestral ones
step evenly in time ("trailing": the first step from timestep 999, the last one to sigma 0). tests/sampling checks each
against the closed form of a Gaussian.
"""

from dataclasses import dataclass, field
from typing import Any

from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from dia_diffusion.errors import InputError
from dia_diffusion.noise import PREDICTION_TYPES
from dia_diffusion.sampling.euler_maruyama import EulerMaruyamaScheduler

# The settings of a scheduler that define the noise process; all others belong to the sampler.
PROCESS_SETTINGS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
# Below this, Heun's corrector weighs a network call at a far smaller sigma than its step starts from, and diverges.
HEUN_MIN_STEPS = 7


@dataclass(frozen=True)
class Sampler:
    """A diffusers scheduler class, its settings, and the prediction types that it can take."""

    scheduler: type[SchedulerMixin]
    settings: dict[str, Any] = field(default_factory=dict)
    prediction_types: tuple[str, ...] = PREDICTION_TYPES


EVEN_TIME = {"timestep_spacing": "trailing"}
EVEN_LOG_SNR = {"use_lu_lambdas": True}

DEFAULT_SAMPLER = "dpmsolver++"

SAMPLERS: dict[str, Sampler] = {
    # Images lie in [-1, 1], so their expectation does too: clipping the predicted image can only correct it.
    "ddpm": Sampler(DDPMScheduler, {**EVEN_TIME, "clip_sample": True}),
    # DPM-Solver++ of first order is DDIM (Lu et al. 2022, section 4), without clipping. diffusers' DDIMScheduler always
    # steps by 1000 // num_inference_steps, which is wrong for numbers of steps that don't divide 1000.
    "ddim": Sampler(DPMSolverMultistepScheduler, {**EVEN_TIME, "solver_order": 1}),
    "dpmsolver++": Sampler(DPMSolverMultistepScheduler, {**EVEN_LOG_SNR, "solver_order": 2}),
    "dpmsolver++3m": Sampler(DPMSolverMultistepScheduler, {**EVEN_LOG_SNR, "solver_order": 3}),
    "dpmsolver++sde": Sampler(
        DPMSolverMultistepScheduler, {**EVEN_LOG_SNR, "solver_order": 2, "algorithm_type": "sde-dpmsolver++"}
    ),
    # Even steps in log sigma / alpha are even steps in log-SNR. diffusers cuts these timesteps down to whole ones.
    "unipc": Sampler(UniPCMultistepScheduler, {"use_exponential_sigmas": True}),
    "euler": Sampler(EulerDiscreteScheduler, EVEN_TIME),
    "euler-ancestral": Sampler(EulerAncestralDiscreteScheduler, EVEN_TIME, ("epsilon", "v_prediction")),
    "heun": Sampler(HeunDiscreteScheduler, {"timestep_spacing": "linspace", "use_exponential_sigmas": True}),
    "euler-maruyama": Sampler(EulerMaruyamaScheduler),
}


def build_scheduler(name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
    """A sampler by name for the noise process and prediction type of a pipeline's scheduler.

    Raises:
        InputError: an unknown name, or a scheduler whose process the sampler can't follow.
    """
    if name not in SAMPLERS:
        raise InputError(f"unknown sampler {name!r}; accepted: {', '.join(SAMPLERS)}")
    sampler, config = SAMPLERS[name], scheduler.config
    prediction_type = config.get("prediction_type")
    if prediction_type not in sampler.prediction_types:
        accepted = ", ".join(sampler.prediction_types)
        raise InputError(f"sampler {name} takes no model that predicts {prediction_type!r}; accepted: {accepted}")
    process = {key: config[key] for key in PROCESS_SETTINGS if key in config}
    return sampler.scheduler.from_config(process, **sampler.settings)


def check_steps(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Raises InputError unless the scheduler can take that many steps. Sets its timesteps."""
    name = type(scheduler).__name__
    lowest = HEUN_MIN_STEPS if isinstance(scheduler, HeunDiscreteScheduler) else 1
    highest = None if isinstance(scheduler, EulerMaruyamaScheduler) else scheduler.config.num_train_timesteps
    if num_inference_steps < lowest or (highest is not None and num_inference_steps > highest):
        accepted = f"at least {lowest}" if highest is None else f"{lowest}..{highest}"
        raise InputError(f"{num_inference_steps} steps; {name} accepts {accepted}")
    scheduler.set_timesteps(num_inference_steps)
    # diffusers' "trailing" timesteps come from a floating-point arange, which now and then holds one too many.
    if scheduler.timesteps.min() < 0:
        raise InputError(f"{name} can't space {num_inference_steps} steps evenly; accepted: a few more or fewer")
