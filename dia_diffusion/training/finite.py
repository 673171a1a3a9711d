"""Steps whose loss or gradient is not finite: skipped, counted, and too many in a row the end of a training.

All of it is decided on the device, which is not waited for at each step. Every process hands in the same numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dia_diffusion.errors import DivergedError


@dataclass(frozen=True)
class Streak:
    """So many skipped steps in a row that the training is over; the numbers are those of the first."""

    length: int
    step: int
    """Counted from 0."""
    loss: float
    gradient_norm: float

    def error(self, rate: float, module: str | None) -> DivergedError:
        """What ends the training; rate: the step's learning rate; module: the first whose output was not finite."""
        others = f" and the {self.length - 1} after it" if self.length > 1 else ""
        where = "the outputs of all modules are finite" if module is None else f"first not finite: output of {module}"
        return DivergedError(
            f"loss or gradient not finite at step {self.step + 1:,}{others}: loss {self.loss:.4g}, gradient norm "
            f"{self.gradient_norm:.4g}, learning rate {rate:.4g}, {where}; no such step was applied and the "
            "checkpoints are kept; try a lower optimizer.learning_rate, a train.clip_grad_norm, or "
            "train.mixed_precision none",
            self.step + 1,
        )


class FiniteWatch:
    """Says of each step whether it is to be skipped, and how many were.

    Args:
        device: where losses and gradients are.
        most_in_a_row: skipped steps that end the training.
        skipped: how many were before this process.
        scaled: fp16's scaler is at work, which meets infinite gradients as part of it: they end nothing.
    """

    def __init__(self, device: torch.device, most_in_a_row: int, skipped: int, scaled: bool):
        self.most_in_a_row, self.scaled = most_in_a_row, scaled
        self.skipped = torch.full((), skipped, device=device)
        """Steps so far, on the device."""
        self._in_a_row = torch.zeros_like(self.skipped)
        self._first_step = torch.zeros_like(self.skipped)
        self._first_values = torch.zeros(2, device=device)  # loss, gradient norm

    def note(self, step: int, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Whether a step, counted from 0, is to be skipped: a bool on the device."""
        skip = ~(loss.isfinite() & gradient_norm.isfinite())
        bad = ~loss.isfinite() if self.scaled else skip
        first = bad & (self._in_a_row == 0)
        self._first_step = torch.where(first, step, self._first_step)
        self._first_values = torch.where(first, torch.stack([loss.float(), gradient_norm.float()]), self._first_values)
        over = self._in_a_row >= self.most_in_a_row  # which stays so until somebody asks
        self._in_a_row = torch.where(over, self._in_a_row, (self._in_a_row + 1) * bad)
        self.skipped = self.skipped + skip
        return skip | (self._in_a_row >= self.most_in_a_row)

    def streak(self) -> Streak | None:
        """The skipped steps that end the training, if they do; waits for the device."""
        if int(self._in_a_row) < self.most_in_a_row:
            return None
        loss, gradient_norm = self._first_values.tolist()
        return Streak(self.most_in_a_row, int(self._first_step), loss, gradient_norm)


class KeptBuffers:
    """A model's buffers, such as BatchNorms' statistics, as they were before a step; few launches for many of them."""

    def __init__(self, model: nn.Module):
        buffers = list(model.buffers())
        kinds = {buffer.dtype for buffer in buffers}
        self._groups = [[buffer for buffer in buffers if buffer.dtype == kind] for kind in kinds]
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """Notes them as they are."""
        self._kept = [_flat(group) for group in self._groups]

    def put_back(self, skip: Tensor) -> None:
        """Makes them what was noted, where `skip`, a bool on their device, says so."""
        for group, kept in zip(self._groups, self._kept, strict=True):
            parts = torch.where(skip, kept, _flat(group)).split([buffer.numel() for buffer in group])
            torch._foreach_copy_(group, [part.view_as(buffer) for part, buffer in zip(parts, group, strict=True)])


def _flat(group: list[Tensor]) -> Tensor:
    return torch.cat([buffer.flatten() for buffer in group])


def first_not_finite(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """The name of the first module whose output is not finite when `forward` runs the model; None: there is none."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not all(bool(tensor.isfinite().all()) for tensor in _tensors(output)):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        forward()
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else None


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a module returns."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
