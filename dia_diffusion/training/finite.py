"""Steps with a non-finite loss or gradient: they are skipped and counted, and too many in a row end the training.

The decision is made on the device, without waiting for it at each step. All ranks pass in the same numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dia_diffusion.errors import DivergedError


@dataclass(frozen=True)
class Streak:
    """The consecutive skipped steps that end a training; step, loss and gradient norm are those of the first."""

    length: int
    step: int
    """Counted from 0."""
    loss: float
    gradient_norm: float


class FiniteWatch:
    """Decides for each step whether to skip it, and counts the skipped ones.

    Args:
        device: of losses and gradients.
        most_in_a_row: the number of consecutive skipped steps that ends the training.
        skipped: steps skipped before this process started.
        scaled: whether fp16's scaler is in use. It causes occasional infinite gradients, which don't end the training.
    """

    def __init__(self, device: torch.device, most_in_a_row: int, skipped: int, scaled: bool):
        self.most_in_a_row, self.scaled = most_in_a_row, scaled
        self.skipped = torch.full((), skipped, device=device)
        """Number of skipped steps so far, on the device."""
        self._in_a_row = torch.zeros_like(self.skipped)
        self._first_step = torch.zeros_like(self.skipped)
        self._first_values = torch.zeros(2, device=device)  # loss, gradient norm

    def note(self, step: int, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Whether to skip a step, counted from 0: a bool () on the device."""
        skip = ~(loss.isfinite() & gradient_norm.isfinite())
        bad = ~loss.isfinite() if self.scaled else skip
        first = bad & (self._in_a_row == 0)
        self._first_step = torch.where(first, step, self._first_step)
        self._first_values = torch.where(first, torch.stack([loss.float(), gradient_norm.float()]), self._first_values)
        over = self._in_a_row >= self.most_in_a_row  # stays true until `streak` is read
        self._in_a_row = torch.where(over, self._in_a_row, (self._in_a_row + 1) * bad)
        self.skipped = self.skipped + skip
        return skip | (self._in_a_row >= self.most_in_a_row)

    def streak(self) -> Streak | None:
        """The skipped steps that end the training, if any; waits for the device."""
        if int(self._in_a_row) < self.most_in_a_row:
            return None
        loss, gradient_norm = self._first_values.tolist()
        return Streak(self.most_in_a_row, int(self._first_step), loss, gradient_norm)


class KeptBuffers:
    """A copy of a model's buffers, such as BatchNorm's statistics, to undo a step; uses few kernel launches."""

    def __init__(self, model: nn.Module):
        buffers = list(model.buffers())
        kinds = {buffer.dtype for buffer in buffers}
        self._groups = [[buffer for buffer in buffers if buffer.dtype == kind] for kind in kinds]
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """Copies the buffers."""
        self._kept = [_flat(group) for group in self._groups]

    def put_back(self, skip: Tensor) -> None:
        """Restores the copies if `skip`, a bool () on their device, is true."""
        for group, kept in zip(self._groups, self._kept, strict=True):
            parts = torch.where(skip, kept, _flat(group)).split([buffer.numel() for buffer in group])
            torch._foreach_copy_(group, [part.view_as(buffer) for part, buffer in zip(parts, group, strict=True)])


def _flat(group: list[Tensor]) -> Tensor:
    return torch.cat([buffer.flatten() for buffer in group])


def divergence(
    streak: Streak, rate: float, model: nn.Module, forward: Callable[[], object], accelerator: Accelerator
) -> DivergedError:
    """The error that ends a training, on all ranks; it names the first module with a non-finite output.

    Args:
        rate: the learning rate of the streak's first step.
        model: in its state before that step.
        forward: runs that step's forward pass.
    """
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            own = first_not_finite(model, forward)
    except Exception:  # such as out of memory without compilation; the divergence is still reported
        own = None
    modules = [name for name, _ in model.named_modules()]
    index = torch.tensor([-1 if own is None else modules.index(own)], device=accelerator.device)
    indices = [number for number in accelerator.gather(index).tolist() if number >= 0]
    where = f"first not finite: output of {modules[indices[0]]}" if indices else "the outputs of all modules are finite"
    others = f" and the {streak.length - 1} after it" if streak.length > 1 else ""
    error = DivergedError(
        f"loss or gradient not finite at step {streak.step + 1:,}{others}: loss {streak.loss:.4g}, gradient norm "
        f"{streak.gradient_norm:.4g}, learning rate {rate:.4g}, {where}; no such step was applied and the "
        "checkpoints are kept; try a lower optimizer.learning_rate, a train.clip_grad_norm, or "
        "train.mixed_precision none",
        streak.step + 1,
    )
    error.reported = not accelerator.is_main_process
    return error


def first_not_finite(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """The name of the first module with a non-finite output when `forward` runs the model; None if there is none."""
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
