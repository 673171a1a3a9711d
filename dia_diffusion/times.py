"""Distributions of the times that training draws, by name.

Each is a quantile function, so the step's uniform draws are the only randomness.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dia_diffusion.errors import InputError
from dia_diffusion.registry import Registry

TIMES: Registry[Callable[..., Tensor]] = Registry("time distribution")
"""(numbers (B,) drawn uniformly from [0, 1), **noise.times_kwargs) -> t (B,) in [0, 1).

A function with a parameter `process` also gets the noise process.
"""


def quantiles(name: str, uniform: Tensor, process: Any, arguments: Mapping[str, Any]) -> Tensor:
    """t (B,) in [0, 1) of a distribution in TIMES, from uniform draws (B,)."""
    row = TIMES[name]
    given = {"process": process} if "process" in _arguments(row) else {}
    return row(uniform, **given, **arguments)


@cache  # training calls this at each step
def _arguments(row: Callable[..., Tensor]) -> tuple[str, ...]:
    """The names of a distribution's arguments other than the draws."""
    return tuple(inspect.signature(row).parameters)[1:]


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Raises InputError unless `noise.times_kwargs` are valid arguments of the distribution."""
    known = [key for key in _arguments(TIMES[name]) if key != "process"]
    for key, value in arguments.items():
        if key not in known:
            accepted = f"have no keys but {', '.join(known)}" if known else "be empty"
            raise InputError(f"`noise.times_kwargs` must {accepted} for noise.times {name}, got {key!r}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"`noise.times_kwargs.{key}` must be a finite number, got {value!r}")
        if key == "deviation" and value <= 0:
            raise InputError(f"`noise.times_kwargs.deviation` must be above 0, got {value!r}")


def _normal(uniform: Tensor, mean: float, deviation: float) -> Tensor:
    """Quantiles (B,) of a normal distribution, float64; finite, since half of the draws' resolution 2^-24 is added."""
    return mean + deviation * torch.special.ndtri(uniform.double() + 2**-25)


def logit_normal(uniform: Tensor, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
    """log(t / (1 - t)) is normal: more times in the middle (Esser et al. 2024, section 3.1)."""
    return _normal(uniform, mean, deviation).sigmoid().float().clamp(max=1 - 2**-24)


def log_normal(uniform: Tensor, process: Any, mean: float = -1.2, deviation: float = 1.2) -> Tensor:
    """log(sigma / alpha) is normal, cut off where the process ends; the defaults are EDM's (Karras et al. 2022)."""
    return process.time_at(_normal(uniform, mean, deviation))


TIMES.register("uniform", lambda uniform: uniform)
TIMES.register("logit-normal", logit_normal)
TIMES.register("log-normal", log_normal)
