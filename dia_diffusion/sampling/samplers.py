"""Samplers by name: rows of a table over diffusers' schedulers, each with the settings that suit the VP process.

Near t = 0 the process's log signal-to-noise ratio changes by more in one timestep than elsewhere in a hundred. Solvers
of higher order extrapolate over a step, so they step evenly in that ratio. Solvers of first order and ancestral ones
step evenly in time ("trailing": the first step from timestep 999, the last one to sigma 0). tests/sampling checks each
against the closed form of a Gaussian.
"""

import copy
import hashlib
import inspect
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dia_diffusion.errors import InputError, first_line
from dia_diffusion.noise_names import PREDICTION_TYPES

if TYPE_CHECKING:  # the table is read for its names by what doesn't wait for diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

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
    """A scheduler class by name, its settings, and the prediction types that it can take."""

    scheduler: str
    settings: dict[str, Any] = field(default_factory=dict)
    prediction_types: tuple[str, ...] = PREDICTION_TYPES

    def scheduler_class(self) -> "type[SchedulerMixin]":
        """The class, of diffusers or this project's own."""
        import diffusers

        from dia_diffusion.sampling.euler_maruyama import EulerMaruyamaScheduler

        ours = self.scheduler == EulerMaruyamaScheduler.__name__
        return EulerMaruyamaScheduler if ours else getattr(diffusers, self.scheduler)


EVEN_TIME = {"timestep_spacing": "trailing"}
EVEN_LOG_SNR = {"use_lu_lambdas": True}

DEFAULT_SAMPLER = "dpmsolver++"
OWN_SAMPLER = "own"  # the scheduler that came with the pipeline, unchanged

SAMPLERS: dict[str, Sampler] = {
    # Images lie in [-1, 1], so their expectation does too: clipping the predicted image can only correct it.
    "ddpm": Sampler("DDPMScheduler", {**EVEN_TIME, "clip_sample": True}),
    # DPM-Solver++ of first order is DDIM (Lu et al. 2022, section 4), without clipping. diffusers' DDIMScheduler always
    # steps by 1000 // num_inference_steps, which is wrong for numbers of steps that don't divide 1000.
    "ddim": Sampler("DPMSolverMultistepScheduler", {**EVEN_TIME, "solver_order": 1}),
    "dpmsolver++": Sampler("DPMSolverMultistepScheduler", {**EVEN_LOG_SNR, "solver_order": 2}),
    "dpmsolver++3m": Sampler("DPMSolverMultistepScheduler", {**EVEN_LOG_SNR, "solver_order": 3}),
    "dpmsolver++sde": Sampler(
        "DPMSolverMultistepScheduler", {**EVEN_LOG_SNR, "solver_order": 2, "algorithm_type": "sde-dpmsolver++"}
    ),
    # Even steps in log sigma / alpha are even steps in log-SNR. diffusers cuts these timesteps down to whole ones.
    "unipc": Sampler("UniPCMultistepScheduler", {"use_exponential_sigmas": True}),
    "euler": Sampler("EulerDiscreteScheduler", EVEN_TIME),
    "euler-ancestral": Sampler("EulerAncestralDiscreteScheduler", EVEN_TIME, ("epsilon", "v_prediction")),
    "heun": Sampler("HeunDiscreteScheduler", {"timestep_spacing": "linspace", "use_exponential_sigmas": True}),
    "euler-maruyama": Sampler("EulerMaruyamaScheduler"),
}


SAMPLER_NAMES = (*SAMPLERS, OWN_SAMPLER)


def check_sampler_name(name: str) -> None:
    """Raises InputError unless there is such a sampler."""
    if name not in SAMPLER_NAMES:
        raise InputError(f"unknown sampler {name!r}; accepted: {', '.join(SAMPLER_NAMES)}")


def build_scheduler(name: str, scheduler: "SchedulerMixin", latent: bool = False) -> "SchedulerMixin":
    """A sampler by name for the noise process and prediction type of a pipeline's scheduler.

    Args:
        name: of SAMPLER_NAMES; `own` is a copy of the pipeline's scheduler.
        scheduler: the pipeline's.
        latent: whether it samples latents, which have no range to be clipped to.

    Raises:
        InputError: an unknown name, or a scheduler whose process the sampler can't follow.
    """
    check_sampler_name(name)
    if name == OWN_SAMPLER:
        return copy.deepcopy(scheduler)
    sampler, config, theirs = SAMPLERS[name], scheduler.config, type(scheduler).__name__
    by_betas = {"trained_betas", "beta_start"} & config.keys() and config.get("snr_shift_scale", 1) == 1
    if "prediction_type" not in config or not by_betas:
        raise InputError(f"sampler {name} can't follow the process of a {theirs}; accepted: {OWN_SAMPLER}")
    prediction_type = config["prediction_type"]
    if prediction_type not in sampler.prediction_types:
        accepted = ", ".join(sampler.prediction_types)
        raise InputError(f"sampler {name} takes no model that predicts {prediction_type!r}; accepted: {accepted}")
    kind = sampler.scheduler_class()
    process = {key: config[key] for key in PROCESS_SETTINGS if key in config}
    if not process.get("rescale_betas_zero_snr"):
        process.pop("rescale_betas_zero_snr", None)
    elif "rescale_betas_zero_snr" not in inspect.signature(kind.__init__).parameters:
        raise InputError(f"sampler {name} can't follow the zero-SNR process of this {theirs}; accepted: {OWN_SAMPLER}")
    try:
        return kind.from_config(process, **_settings(sampler, latent))
    except NotImplementedError:  # not every scheduler knows every beta_schedule
        betas = f"beta_schedule {config.get('beta_schedule')!r}"
        raise InputError(f"sampler {name} can't follow {betas} of this {theirs}; accepted: {OWN_SAMPLER}") from None


def scheduler_settings(name: str, scheduler: "SchedulerMixin", latent: bool = False) -> dict[str, Any]:
    """The settings behind a sampler, as plain values: those of the table, or all of the pipeline's own scheduler.

    Arguments are those of `build_scheduler`. A list of betas is given by its hash.
    """
    if name != OWN_SAMPLER:
        return _settings(SAMPLERS[name], latent)
    settings = {
        key: str(value) if value in (math.inf, -math.inf) else value  # which JSON has no numbers for
        for key, value in dict(scheduler.config).items()
        if not key.startswith("_")
    }
    if settings.get("trained_betas") is not None:
        betas = json.dumps([float(beta) for beta in settings["trained_betas"]])
        settings["trained_betas"] = f"sha256:{hashlib.sha256(betas.encode()).hexdigest()}"
    return {"class": type(scheduler).__name__, **json.loads(json.dumps(settings, default=str))}


def _settings(sampler: Sampler, latent: bool) -> dict[str, Any]:
    return (
        {**sampler.settings, "clip_sample": False} if latent and "clip_sample" in sampler.settings else sampler.settings
    )


def check_steps(scheduler: "SchedulerMixin", num_inference_steps: int) -> None:
    """Raises InputError unless the scheduler can take that many steps. Sets its timesteps."""
    name = type(scheduler).__name__
    lowest = HEUN_MIN_STEPS if name == SAMPLERS["heun"].scheduler else 1
    highest = None if name == SAMPLERS["euler-maruyama"].scheduler else scheduler.config.get("num_train_timesteps")
    if highest is not None and highest < lowest:
        raise InputError(f"this {name} has num_train_timesteps {highest}; accepted: {lowest} or more")
    if num_inference_steps < lowest or (highest is not None and num_inference_steps > highest):
        accepted = f"at least {lowest}" if highest is None else f"{lowest}..{highest}"
        raise InputError(f"{num_inference_steps} steps; {name} accepts {accepted}")
    try:
        scheduler.set_timesteps(num_inference_steps)
    except Exception as error:  # what a scheduler makes of a number that it didn't foresee
        told = f"{name} accepts other numbers ({first_line(error)})"
        raise InputError(f"{num_inference_steps} steps; {told}") from None
    # diffusers' "trailing" timesteps come from a floating-point arange, which now and then holds one too many.
    if scheduler.config.get("timestep_spacing") == "trailing" and scheduler.timesteps.min() < 0:
        raise InputError(f"{name} can't space {num_inference_steps} steps evenly; accepted: a few more or fewer")
