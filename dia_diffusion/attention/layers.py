"""Layers that compute in the precision of their input: float32 where the weights have been cast to less.

They are modules and cast in their forward, so that what replaces or hooks a module (LoRA, offloading) works on them.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_diffusion.errors import InputError


def bottleneck_width(channels: int, reduction: int) -> int:
    """N / r, the width of the first linear map; r must divide N."""
    if reduction < 1 or channels % reduction:
        raise InputError(f"reduction {reduction} does not divide the {channels} channels; use a divisor of {channels}")
    return channels // reduction


class CastLinear(nn.Linear):
    """nn.Linear with its weights cast to the dtype of its input (..., N)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, _cast(self.weight, input), _cast(self.bias, input))


class CastConv2d(nn.Conv2d):
    """nn.Conv2d with its weights cast to the dtype of its input (B, N, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, _cast(self.weight, input), _cast(self.bias, input))


class CastBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d with its weights and statistics cast to the dtype of its input (B, N, H, W).

    In training it computes in the dtype of its weights, which its running statistics are kept in.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            return super().forward(input.to(self.weight.dtype)).to(input.dtype)
        statistics = _cast(self.running_mean, input), _cast(self.running_var, input)
        return F.batch_norm(input, *statistics, _cast(self.weight, input), _cast(self.bias, input), eps=self.eps)


def _cast(parameter: Tensor | None, like: Tensor) -> Any:
    return None if parameter is None else parameter.to(like.dtype)


def batch_norm(layer: nn.Module, x: Tensor) -> Tensor:
    """A BatchNorm layer of x (B, N, H, W); its running statistics stay while gradient checkpointing recomputes.

    torch's own layer would count a recomputed batch twice.

    Args:
        layer: a CastBatchNorm2d, or the nn.SyncBatchNorm it was converted to.

    Raises:
        InputError: training with one value a channel, which has no variance.
    """
    if layer.training and x.shape[0] * x.shape[2] * x.shape[3] < 2:
        raise InputError(
            "the unit's BatchNorm has one value a channel; accepted in training: batches of 2 images or more"
        )
    with running_statistics_kept(layer) if layer.training and recomputing() else nullcontext():
        return layer(x)


@contextmanager
def running_statistics_kept(layer: nn.Module) -> Iterator[None]:
    """While it lasts, the layer updates copies of its running statistics."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    kept = {name: getattr(layer, name) for name in names}
    for name, statistic in kept.items():
        setattr(layer, name, statistic.clone())
    try:
        yield
    finally:
        for name, statistic in kept.items():
            setattr(layer, name, statistic)


def recomputing() -> bool:
    """Whether this forward pass runs within a backward pass, as gradient checkpointing's second one does."""
    # Compiled, the two passes are one graph, whose statistics are updated once.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
