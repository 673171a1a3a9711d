"""The moving average of the weights."""

import torch
from torch import Tensor

from dia_diffusion.training.config import EmaConfig


class EMA:
    """The average of a model's parameters over the steps; a skipped step leaves it as it was.

    Args:
        parameters: the model's.
        config: its decay, and the decay's warm-up.
        reference_steps: how many steps of the average one step counts as.
    """

    def __init__(self, parameters: list[Tensor], config: EmaConfig, reference_steps: float = 1.0):
        self.config = config
        self.reference_steps = reference_steps
        self.parameters = [parameter.detach().clone() for parameter in parameters]
        """In the order of the model's."""
        self.steps = 0

    def load(self, averaged: list[Tensor], steps: int) -> None:
        """Restores the averages of an earlier run after `steps` steps."""
        for own, kept in zip(self.parameters, averaged, strict=True):
            own.copy_(kept)
        self.steps = steps

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
