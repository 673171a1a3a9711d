"""Samplers by name, and sampling settings: sampler, steps, classes, seeds.

Samplers are rows of a table over schedulers, each with settings that suit the VP process. Near t = 0 the process's log
signal-to-noise ratio changes more in one timestep than in a hundred elsewhere. Higher-order solvers extrapolate over a
step, so they step evenly in that ratio. First-order and ancestral samplers step evenly in time ("trailing": the first
step from timestep 999, the last one to sigma 0). tests/sampling checks each against the closed form for a Gaussian.

Nothing here imports torch or diffusers until a scheduler is built, since commands read names and seeds before that.
"""

import copy
import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dia_diffusion.errors import InputError, first_line, one_line
from dia_diffusion.registry import Registry

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

# The scheduler settings that define a process given by betas; all others belong to the sampler.
BETA_SETTINGS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
# With fewer steps, Heun's corrector weights a network call at a sigma far below the start of its step, and diverges.
HEUN_MIN_STEPS = 7


def has_betas(scheduler: "SchedulerMixin") -> bool:
    """Whether a scheduler's config defines its process by unmodified betas and gives the network's prediction type."""
    config = scheduler.config
    by_betas = "trained_betas" in config or "beta_start" in config
    known = by_betas and "prediction_type" in config and config.get("snr_shift_scale", 1) == 1
    return known and not config.get("use_flow_sigmas")


@dataclass(frozen=True)
class Sampler:
    """A way to run a pipeline's noise process backwards."""

    scheduler: "str | type[SchedulerMixin]"
    """A scheduler class, or the name of one in diffusers."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The scheduler's settings, as plain values, since records keep them."""
    prediction_types: tuple[str, ...] = ("epsilon", "sample", "v_prediction")
    """The prediction types that its scheduler accepts; others are converted to the first of these."""
    process_settings: tuple[str, ...] = BETA_SETTINGS
    """The settings that it copies from the pipeline's scheduler."""
    follows: "Callable[[SchedulerMixin], bool]" = has_betas
    """(a pipeline's scheduler) -> whether it can run that scheduler's process."""
    flow: "Sampler | None" = None
    """Its scheduler and settings for the flow; None if it can't run the flow."""

    def for_process(self, scheduler: "SchedulerMixin") -> "Sampler | None":
        """The sampler for the process of a pipeline's scheduler: this one, its `flow`, or None."""
        from dia_diffusion.schedulers import is_flow

        if self.flow is not None and is_flow(scheduler):
            return self.flow
        return self if self.follows(scheduler) else None

    def scheduler_class(self) -> "type[SchedulerMixin]":
        """The scheduler's class, from diffusers or elsewhere."""
        if not isinstance(self.scheduler, str):
            return self.scheduler
        import diffusers

        from dia_diffusion.sampling.euler_maruyama import EulerMaruyamaScheduler

        ours = self.scheduler == EulerMaruyamaScheduler.__name__
        return EulerMaruyamaScheduler if ours else getattr(diffusers, self.scheduler)

    def settings_for(self, latent: bool) -> dict[str, Any]:
        """The settings for images, or for latents, which have no range to clip to."""
        clips = latent and "clip_sample" in self.settings
        return {**self.settings, **({"clip_sample": False} if clips else {})}


EVEN_TIME = {"timestep_spacing": "trailing"}
EVEN_LOG_SNR = {"use_lu_lambdas": True}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}  # even steps in t

DEFAULT_SAMPLER = "dpmsolver++"
OWN_SAMPLER = "own"  # the scheduler that came with the pipeline, unchanged

SAMPLERS: Registry[Sampler] = Registry("sampler")
# Images are in [-1, 1], and so is their expectation: clipping the predicted image can only improve it.
SAMPLERS.register("ddpm", Sampler("DDPMScheduler", {**EVEN_TIME, "clip_sample": True}))
# First-order DPM-Solver++ is DDIM (Lu et al. 2022, section 4), without clipping. diffusers' DDIMScheduler always steps
# by 1000 // num_inference_steps, which is wrong if the number of steps doesn't divide 1000.
SAMPLERS.register("ddim", Sampler("DPMSolverMultistepScheduler", {**EVEN_TIME, "solver_order": 1}))
SAMPLERS.register(
    "dpmsolver++",
    Sampler(
        "DPMSolverMultistepScheduler",
        {**EVEN_LOG_SNR, "solver_order": 2},
        flow=Sampler("DPMSolverMultistepScheduler", {**FLOW, "solver_order": 2}),
    ),
)
SAMPLERS.register("dpmsolver++3m", Sampler("DPMSolverMultistepScheduler", {**EVEN_LOG_SNR, "solver_order": 3}))
SAMPLERS.register(
    "dpmsolver++sde",
    Sampler(
        "DPMSolverMultistepScheduler",
        {**EVEN_LOG_SNR, "solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
        flow=Sampler("DPMSolverMultistepScheduler", {**FLOW, "solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
    ),
)
# Even steps in log sigma / alpha are even steps in log-SNR. diffusers truncates these timesteps to whole ones.
SAMPLERS.register(
    "unipc",
    Sampler(
        "UniPCMultistepScheduler",
        {"use_exponential_sigmas": True},
        flow=Sampler("UniPCMultistepScheduler", FLOW),
    ),
)
SAMPLERS.register(
    "euler", Sampler("EulerDiscreteScheduler", EVEN_TIME, flow=Sampler("FlowMatchEulerDiscreteScheduler"))
)
SAMPLERS.register("euler-ancestral", Sampler("EulerAncestralDiscreteScheduler", EVEN_TIME, ("epsilon", "v_prediction")))
SAMPLERS.register(
    "heun",
    Sampler(
        "HeunDiscreteScheduler",
        {"timestep_spacing": "linspace", "use_exponential_sigmas": True},
        flow=Sampler("FlowMatchHeunDiscreteScheduler"),
    ),
)
SAMPLERS.register("euler-maruyama", Sampler("EulerMaruyamaScheduler"))


def check_sampler_name(name: str) -> str:
    """The name. Raises InputError if there is no sampler of this name."""
    if name != OWN_SAMPLER and name not in SAMPLERS:
        raise InputError(f"`sampler` must be one of {', '.join([*SAMPLERS, OWN_SAMPLER])}, got {name!r}")
    return name


def samplers_of(scheduler: "SchedulerMixin") -> list[str]:
    """The samplers that can run the process of a pipeline's scheduler."""
    return [*(name for name, sampler in SAMPLERS.items() if sampler.for_process(scheduler)), OWN_SAMPLER]


def build_scheduler(
    name: str, scheduler: "SchedulerMixin", latent: bool = False, convert: bool = False
) -> "SchedulerMixin":
    """A sampler by name for the noise process and prediction type of a pipeline's scheduler.

    Args:
        name: in SAMPLERS, or `own` for a copy of the pipeline's scheduler.
        scheduler: the pipeline's.
        latent: whether it samples latents, which have no range to clip to.
        convert: whether the caller converts unsupported prediction types, with `schedulers.prediction_converter`.

    Raises:
        InputError: an unknown name, a process that the sampler can't run, or, without `convert`, an unsupported
            prediction type.
    """
    check_sampler_name(name)
    if name == OWN_SAMPLER:
        return copy.deepcopy(scheduler)
    sampler, config, theirs = SAMPLERS[name].for_process(scheduler), scheduler.config, type(scheduler).__name__
    if sampler is None:
        accepted = ", ".join(samplers_of(scheduler))
        raise InputError(f"`sampler` must be one of {accepted} for the process of a {theirs}, got {name!r}")
    kind = sampler.scheduler_class()
    if sampler is SAMPLERS[name].flow:  # takes velocities; UViTPipeline's loop converts other predictions
        key = "flow_shift" if "flow_shift" in inspect.signature(kind.__init__).parameters else "shift"
        shift = {key: config.get("flow_shift", config.get("shift", 1.0))}
        return kind(num_train_timesteps=config.num_train_timesteps, **shift, **sampler.settings_for(latent))
    prediction_type = config.get("prediction_type")
    process = {key: config[key] for key in sampler.process_settings if key in config}
    if prediction_type is not None and prediction_type not in sampler.prediction_types:
        if not convert:  # the scheduler would misread the prediction
            accepted = ", ".join(sampler.prediction_types)
            raise InputError(f"`prediction_type` must be one of {accepted} for {name}, got {prediction_type!r}")
        process["prediction_type"] = sampler.prediction_types[0]
    if not process.get("rescale_betas_zero_snr"):
        process.pop("rescale_betas_zero_snr", None)
    elif "rescale_betas_zero_snr" not in inspect.signature(kind.__init__).parameters:
        raise InputError(f"`sampler` must be one for zero SNR, such as {OWN_SAMPLER}, for this {theirs}, got {name!r}")
    try:
        return kind.from_config(process, **sampler.settings_for(latent))
    except NotImplementedError:  # not every scheduler supports every beta_schedule
        betas = f"beta_schedule {config.get('beta_schedule')!r}"
        raise InputError(f"`sampler` must be {OWN_SAMPLER} for the {betas} of this {theirs}, got {name!r}") from None


def scheduler_settings(name: str, scheduler: "SchedulerMixin", latent: bool = False) -> dict[str, Any]:
    """A sampler's settings as plain values: those in the table, or all of the pipeline's own scheduler.

    For the arguments see `build_scheduler`. A list of betas is replaced by its hash.
    """
    if name != OWN_SAMPLER and (sampler := SAMPLERS[name].for_process(scheduler)) is not None:
        process = {"process": "flow"} if sampler is SAMPLERS[name].flow else {}
        return {**sampler.settings_for(latent), **process}
    settings = {
        key: str(value) if value in (math.inf, -math.inf) else value  # JSON has no infinities
        for key, value in dict(scheduler.config).items()
        if not key.startswith("_")
    }
    if settings.get("trained_betas") is not None:
        betas = json.dumps([float(beta) for beta in settings["trained_betas"]])
        settings["trained_betas"] = f"sha256:{hashlib.sha256(betas.encode()).hexdigest()}"
    return {"class": type(scheduler).__name__, **json.loads(json.dumps(settings, default=str))}


def check_steps(scheduler: "SchedulerMixin", num_inference_steps: int) -> None:
    """Raises InputError if the scheduler doesn't support this number of steps. Sets its timesteps."""
    name = type(scheduler).__name__
    lowest = HEUN_MIN_STEPS if name == "HeunDiscreteScheduler" else 1
    highest = None if name == "EulerMaruyamaScheduler" else scheduler.config.get("num_train_timesteps")
    if highest is not None and highest < lowest:
        raise InputError(f"`num_train_timesteps` must be {lowest} or more for {name}, got {highest}")
    if num_inference_steps < lowest or (highest is not None and num_inference_steps > highest):
        accepted = f"{lowest} or more" if highest is None else f"{lowest} to {highest}"
        raise InputError(f"`steps` must be {accepted} for {name}, got {num_inference_steps}")
    try:
        scheduler.set_timesteps(num_inference_steps)
    except Exception as error:  # schedulers check the number of steps in various ways, or not at all
        reason = first_line(error)
        raise InputError(
            f"`steps` must be a number that {name} accepts ({reason}), got {num_inference_steps}"
        ) from None
    # diffusers computes "trailing" timesteps with a floating-point arange, which sometimes has one too many.
    if scheduler.config.get("timestep_spacing") == "trailing" and scheduler.timesteps.min() < 0:
        raise InputError(
            f"`steps` must be a few more or fewer, since {name} can't space them evenly, got {num_inference_steps}"
        )


PRECISIONS = ("float32", "bfloat16", "float16")
"""dtypes of the network while sampling, as torch names."""


@dataclass(frozen=True)
class SamplingSettings:
    """All sampling settings except the seeds."""

    sampler: str = DEFAULT_SAMPLER
    """A name in SAMPLERS, or OWN_SAMPLER."""
    steps: int = 50
    """Steps of the sampler."""
    classes: tuple[int, ...] | None = None
    """For class-conditional models: seed s gets class classes[s % len(classes)]; None cycles through all classes."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance or autoguidance; 1 is none."""
    guidance_interval: Sequence[float] | None = None
    """Guidance applies where low < sigma / alpha <= high; None is everywhere."""

    def labels(self, seeds: Sequence[int]) -> list[int] | None:
        """The class of each seed's image."""
        return None if self.classes is None else [self.classes[seed % len(self.classes)] for seed in seeds]

    def grid_columns(self, seeds: Sequence[int]) -> int | None:
        """The number of columns that gives each column of a grid of these seeds one class; None if there is none.

        One column per class, or several if the grid would otherwise be much taller than wide.
        """
        num_classes = len(self.classes or ())
        if not 0 < num_classes <= len(seeds):
            return None
        if any((seed - seeds[0] - index) % num_classes for index, seed in enumerate(seeds)):
            return None
        return num_classes * max(1, round(math.sqrt(len(seeds)) / num_classes))

    def class_text(self) -> str | None:
        """The classes as text, such as "0,1,2"."""
        return None if self.classes is None else ",".join(map(str, self.classes))

    def to_dict(self, scheduler: Mapping[str, Any]) -> dict[str, Any]:
        """The settings, with those of the scheduler, as plain values for JSON."""
        values = {**asdict(self), "classes": self.class_text(), "scheduler": dict(scheduler)}
        interval = values.pop("guidance_interval")  # so that older image folders can be completed
        return values if interval is None else {**values, "guidance_interval": list(interval)}


MAX_SEEDS = 10_000_000
MAX_SEED = 2**32 - 1  # torch's CPU generator ignores higher bits: 7 and 7 + 2**32 would give the same image


def parse_seeds(text: str) -> list[int]:
    """Seeds from text such as "0-63,100,7", in that order.

    Raises:
        InputError: not such a list, a seed of 2**32 or more, a duplicate, or more than ten million seeds.
    """
    seeds: list[int] = []
    shown = one_line(text)
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,19})(?:-(\d{1,19}))?", part.strip(), flags=re.ASCII)
        if match is None:
            raise InputError(f"`seeds` must be seeds and ranges such as 0-63,100,7, got {one_line(part)!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last > MAX_SEED:
            raise InputError(f"`seeds` must be 0 to {MAX_SEED}, got {one_line(part)!r}")
        if last < first:
            raise InputError(f"a range of `seeds` must go upwards, got {one_line(part)!r}")
        if len(seeds) + last - first >= MAX_SEEDS:
            raise InputError(f"`seeds` must be {MAX_SEEDS} or fewer, got {shown!r}")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) < len(seeds):
        raise InputError(f"`seeds` must name each seed once, got {shown!r}")
    return seeds
