"""Whether a training stays finite, without waiting for the device at each step."""

import torch
from accelerate import Accelerator
from torch import Tensor

from dia_diffusion.errors import DivergedError


class FiniteWatch:
    """Remembers the first step whose loss or gradient was not finite."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.bad_step = torch.full((), -1, device=accelerator.device)

    def note(self, step: int, loss: Tensor, gradient_norm: Tensor) -> None:
        """Looks at a step, counted from 0."""
        finite = loss.isfinite()
        if self.accelerator.scaler is None:  # fp16's scaler meets infinite gradients as part of its work
            finite = finite & gradient_norm.isfinite()
        self.bad_step = torch.where(finite | (self.bad_step >= 0), self.bad_step, step)

    def check(self) -> None:
        """Raises DivergedError, on all processes, where a step on one of them was not finite."""
        steps = self.accelerator.gather(self.bad_step.reshape(1))
        bad_step = int(steps.max())
        if bad_step >= 0:
            error = DivergedError(
                f"loss or gradient not finite at step {bad_step + 1:,}; the checkpoints before it are kept; try a "
                "lower optimizer.learning_rate, a train.clip_grad_norm, or train.mixed_precision none",
                bad_step + 1,
            )
            error.told = not self.accelerator.is_main_process
            raise error
