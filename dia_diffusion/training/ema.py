"""Moving averages of the weights: exponential, and power-function averages (Karras et al. 2024, arXiv 2312.02696)."""

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dia_diffusion.training.config import EmaConfig

Array = npt.NDArray[np.float64]


def width_of(gamma: float) -> float:
    """The width sigma_rel of a power-function average: the standard deviation of its profile tau^gamma on 0..1.

    Equation 126 of EDM2 with t = 1.
    """
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


def gamma_of(width: float) -> float:
    """The exponent gamma >= 0 of the average of relative width 0 < width < 1/sqrt(12), which is gamma 0.

    The largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / width^2.
    """
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


def inner_products(steps: Array, gammas: Array, other_steps: Array, other_gammas: Array) -> Array:
    """Integrals of the products of two profiles over training, broadcast; all steps above 0.

    Of p(tau) = (gamma+1) tau^gamma / t^(gamma+1) on 0..t and of the later q, ending at u, the integral over 0..t is
    (gamma+1) (gamma'+1) / (gamma+gamma'+1) (t/u)^gamma' / u.
    """
    later_gammas = np.where(steps <= other_steps, other_gammas, gammas)
    earlier, later = np.minimum(steps, other_steps), np.maximum(steps, other_steps)
    factor = (gammas + 1) * (other_gammas + 1) / (gammas + other_gammas + 1)
    return np.asarray(factor * (earlier / later) ** later_gammas / later)


def reconstruction(steps: Array, gammas: Array, step: float, wanted: Array) -> tuple[Array, Array]:
    """Weights by which a sum of averages is nearest to other averages: least squares over the profiles (EDM2, C.1).

    The weights sum to 1, which EDM2 doesn't ask for: weights that don't move come out as they are.

    Args:
        steps: (N,), after which step each average was kept.
        gammas: (N,), their exponents.
        step: of the averages wanted.
        wanted: (M,), their exponents.

    Returns:
        The weights (N, M), and the residuals (M,): the norm of the difference of profiles, as a part of the wanted one.
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

    parameters: the model's, from which it starts.
    """

    def __init__(self, parameters: list[Tensor]):
        self.parameters = [parameter.detach().clone() for parameter in parameters]
        """In the order of the model's."""
        self.steps = 0

    def load(self, averaged: list[Tensor], steps: int) -> None:
        """Restores the averages of an earlier run after `steps` steps."""
        for own, kept in zip(self.parameters, averaged, strict=True):
            own.copy_(kept)
        self.steps = steps

    @abstractmethod
    def update(self, parameters: list[Tensor], skip: Tensor) -> None:
        """Moves toward the model's parameters after a step; `skip`, a bool () on their device: they didn't change."""


class EMA(Average):
    """The exponential moving average; a skipped step leaves it as it was.

    Args:
        parameters: the model's.
        config: its decay, and the decay's warm-up.
        reference_steps: how many steps of the average one step counts as.
    """

    def __init__(self, parameters: list[Tensor], config: EmaConfig, reference_steps: float = 1.0):
        super().__init__(parameters)
        self.config = config
        self.reference_steps = reference_steps

    @torch.no_grad()
    def update(self, parameters: list[Tensor], skip: Tensor) -> None:
        """Moves toward the model's parameters, unless `skip`, a bool () on their device, is true."""
        self.steps += 1
        decay = self.config.decay
        if self.config.warmup:
            step = self.steps * self.reference_steps
            decay = min(decay, (1 + step) / (10 + step))
        weight = (1 - decay**self.reference_steps) * (~skip).to(self.parameters[0].dtype)
        if skip.device.type == "cpu":
            for own, parameter in zip(self.parameters, parameters, strict=True):
                own.lerp_(parameter, weight)
        else:  # the same in few launches; lists of tensors have no lerp by a number on the device
            difference = torch._foreach_sub(parameters, self.parameters)
            torch._foreach_mul_(difference, weight)
            torch._foreach_add_(self.parameters, difference)


class PowerEMA(Average):
    """The power-function average: theta'_t = beta_t theta'_(t-1) + (1 - beta_t) theta_t, beta_t = (1 - 1/t)^(gamma+1).

    The weights after step k count with (k^(gamma+1) - (k-1)^(gamma+1)) / t^(gamma+1): exactly the average, by the
    profile (gamma+1) tau^gamma / t^(gamma+1) on 0..t, of weights that are constant within each step. A skipped step
    counts as one in which the weights stayed, so the profile holds whatever was skipped.

    Args:
        parameters: the model's. They don't count: beta_1 is 0.
        width: sigma_rel.
    """

    def __init__(self, parameters: list[Tensor], width: float):
        super().__init__(parameters)
        self.gamma = gamma_of(width)

    @torch.no_grad()
    def update(self, parameters: list[Tensor], skip: Tensor) -> None:
        """Moves toward the model's parameters, whether they changed or not."""
        self.steps += 1
        beta = (1 - 1 / self.steps) ** (self.gamma + 1)
        torch._foreach_lerp_(self.parameters, parameters, 1 - beta)


def average_name(*, decay: float | None = None, width: float | None = None) -> str:
    """As "decay-0.999" or "width-0.05", in checkpoints, snapshots and folders."""
    return f"width-{width}" if decay is None else f"decay-{decay}"


def further_averages(parameters: list[Tensor], config: EmaConfig, reference_steps: float) -> dict[str, Average]:
    """Those that a run keeps beside the EMA, by name."""
    averages: dict[str, Average] = {}
    for decay in config.further_decays:
        of_decay = config.model_copy(update={"decay": decay})
        averages[average_name(decay=decay)] = EMA(parameters, of_decay, reference_steps)
    for width in config.power_widths:
        averages[average_name(width=width)] = PowerEMA(parameters, width)
    return averages
