"""Layers that compute in the precision of their input: float32 where the weights have been cast to less."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_diffusion.errors import InputError


def bottleneck_width(channels: int, reduction: int) -> int:
    """N / r, the width of the first linear map; r must divide N."""
    if reduction < 1 or channels % reduction:
        raise InputError(f"reduction {reduction} does not divide the {channels} channels; use a divisor of {channels}")
    return channels // reduction


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer of x (..., N)."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def conv2d(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The layer, which has no bias and as much zero padding as keeps the size, of x (B, N, H, W)."""
    return F.conv2d(x, layer.weight.to(x.dtype), padding="same")


def batch_norm(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """A BatchNorm layer of x (B, N, H, W); while gradient checkpointing recomputes, its running statistics stay.

    torch's own layer would count a recomputed batch twice.

    Raises:
        InputError: training with one value a channel, which has no variance.
    """
    assert layer.running_mean is not None and layer.running_var is not None
    if not layer.training:
        statistics = layer.running_mean.to(x.dtype), layer.running_var.to(x.dtype)
        return F.batch_norm(x, *statistics, layer.weight.to(x.dtype), layer.bias.to(x.dtype), eps=layer.eps)
    if x.shape[0] * x.shape[2] * x.shape[3] < 2:
        raise InputError(
            "the unit's BatchNorm has one value a channel; accepted in training: batches of 2 images or more"
        )
    with running_statistics_kept(layer) if recomputing() else nullcontext():
        return layer(x.to(layer.weight.dtype)).to(x.dtype)


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
