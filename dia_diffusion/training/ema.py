"""Moving averages of the weights: exponential, and power-function averages (Karras et al. 2024, arXiv 2312.02696)."""

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dia_diffusion.training.config import EmaConfig

Array = npt.NDArray[np.float64]


def gamma_of(width: float) -> float:
    """The exponent gamma >= 0 of the average with relative width 0 < width < 1/sqrt(12), where gamma is 0.

    The width sigma_rel is the standard deviation of the profile tau^gamma on 0..1 (EDM2's equation 126 with t = 1), so
    gamma is the largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / width^2.
    """
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


def inner_products(steps: Array, gammas: Array, other_steps: Array, other_gammas: Array) -> Array:
    """Integrals over training of the products of two profiles, broadcast; all steps must be above 0.

    For p(tau) = (gamma+1) tau^gamma / t^(gamma+1) on 0..t and a later q that ends at u, the integral over 0..t is
    (gamma+1) (gamma'+1) / (gamma+gamma'+1) (t/u)^gamma' / u.
    """
    later_gammas = np.where(steps <= other_steps, other_gammas, gammas)
    earlier, later = np.minimum(steps, other_steps), np.maximum(steps, other_steps)
    factor = (gammas + 1) * (other_gammas + 1) / (gammas + other_gammas + 1)
    return np.asarray(factor * (earlier / later) ** later_gammas / later)


def reconstruction(steps: Array, gammas: Array, step: float, wanted: Array) -> tuple[Array, Array]:
    """Coefficients with which a sum of averages is closest to other averages: least squares of profiles (EDM2, C.1).

    The coefficients sum to 1, which EDM2 doesn't require, so that model weights that never changed are reproduced.

    Args:
        steps: (N,), the step after which each average was stored.
        gammas: (N,), their exponents.
        step: the step of the wanted averages.
        wanted: (M,), their exponents.

    Returns:
        The coefficients (N, M), and the residuals (M,): the norm of the difference of profiles, relative to the wanted
        profile's.
    """
    steps, ones = steps / step, np.ones(len(steps))
    gram = inner_products(steps[:, None], gammas[:, None], steps, gammas)  # (N, N)
    right = inner_products(steps[:, None], gammas[:, None], np.ones(1), wanted)  # (N, M)
    squares = inner_products(np.ones(1), wanted, np.ones(1), wanted)  # (M,)
    system = np.block([[gram, ones[:, None]], [ones, np.zeros(1)]])  # with a Lagrange multiplier
    weights = np.linalg.solve(system, np.vstack([right, np.ones(len(wanted))]))[:-1]
    errors = (weights * (gram @ weights - 2 * right)).sum(axis=0) + squares
    return weights, np.sqrt(np.maximum(errors, 0) / squares)


class Average(ABC):
    """An average of a model's parameters over the steps.

    parameters: the model's, which are the initial average.
    """

    def __init__(self, parameters: list[Tensor]):
        self.parameters = [parameter.detach().clone() for parameter in parameters]
        """The averages, in the order of the model's parameters."""
        self.steps = 0

    def load(self, averaged: list[Tensor], steps: int) -> None:
        """Restores the averages of an earlier run after `steps` steps."""
        for own, kept in zip(self.parameters, averaged, strict=True):
            own.copy_(kept)
        self.steps = steps

    @abstractmethod
    def update(self, parameters: list[Tensor], skip: Tensor) -> None:
        """Updates the average after a step; `skip`, a bool () on the parameters' device: they didn't change."""


class EMA(Average):
    """The exponential moving average; a skipped step doesn't change it.

    Args:
        parameters: the model's.
        config: the decay and its warm-up.
        reference_steps: how many steps of the average one step counts as.
    """

    def __init__(self, parameters: list[Tensor], config: EmaConfig, reference_steps: float = 1.0):
        super().__init__(parameters)
        self.config = config
        self.reference_steps = reference_steps

    @torch.no_grad()
    def update(self, parameters: list[Tensor], skip: Tensor) -> None:
        """Updates the average, unless `skip`, a bool () on the parameters' device, is true."""
        self.steps += 1
        decay = self.config.decay
        if self.config.warmup:
            step = self.steps * self.reference_steps
            decay = min(decay, (1 + step) / (10 + step))
        weight = (1 - decay**self.reference_steps) * (~skip).to(self.parameters[0].dtype)
        if skip.device.type == "cpu":
            for own, parameter in zip(self.parameters, parameters, strict=True):
                own.lerp_(parameter, weight)
        else:  # the same with few kernel launches; there is no foreach lerp with a weight on the device
            difference = torch._foreach_sub(parameters, self.parameters)
            torch._foreach_mul_(difference, weight)
            torch._foreach_add_(self.parameters, difference)


class PowerEMA(Average):
    """The power-function average: theta'_t = beta_t theta'_(t-1) + (1 - beta_t) theta_t, beta_t = (1 - 1/t)^(gamma+1).

    The weights after step k have the coefficient (k^(gamma+1) - (k-1)^(gamma+1)) / t^(gamma+1): exactly the average,
    with the profile (gamma+1) tau^gamma / t^(gamma+1) on 0..t, of weights that are constant within each step. A skipped
    step counts as one in which the weights didn't change, so skipping doesn't affect the profile.

    Args:
        parameters: the model's. Their initial values don't count: beta_1 is 0.
        width: sigma_rel.
    """

    def __init__(self, parameters: list[Tensor], width: float):
        super().__init__(parameters)
        self.gamma = gamma_of(width)

    @torch.no_grad()
    def update(self, parameters: list[Tensor], skip: Tensor) -> None:
        """Updates the average, whether the parameters changed or not."""
        self.steps += 1
        beta = (1 - 1 / self.steps) ** (self.gamma + 1)
        torch._foreach_lerp_(self.parameters, parameters, 1 - beta)


def average_name(*, decay: float | None = None, width: float | None = None) -> str:
    """The name of an average in checkpoints, snapshots and folders, such as "decay-0.999" or "width-0.05"."""
    return f"width-{width}" if decay is None else f"decay-{decay}"


def further_averages(parameters: list[Tensor], config: EmaConfig, reference_steps: float) -> dict[str, Average]:
    """The averages that a run keeps in addition to the EMA, by name."""
    averages: dict[str, Average] = {}
    for decay in config.further_decays:
        of_decay = config.model_copy(update={"decay": decay})
        averages[average_name(decay=decay)] = EMA(parameters, of_decay, reference_steps)
    for width in config.power_widths:
        averages[average_name(width=width)] = PowerEMA(parameters, width)
    return averages
