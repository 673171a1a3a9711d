"""Layers, extraction and recalibration that attention units share (arXiv 2210.16101, Fig. 4).

Features are tokens (B, L, N) or maps (B, N, H, W). Statistics are float32, or float64 for float64 features. Layers
compute in the precision of their input by casting weights in forward, so that LoRA and offload hooks work on them.
"""

import math
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
        raise InputError(f"`reduction` must divide the {channels} channels, got {reduction}")
    return channels // reduction


def check_calls(call: int, num_blocks: int) -> None:
    """Raises InputError for more calls in a forward pass than a unit has blocks."""
    if call > num_blocks:
        raise InputError(f"calls of the unit per forward pass must be {num_blocks} at most, got call {call}")


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

    In training it computes in the dtype of its weights and running statistics.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            return super().forward(input.to(self.weight.dtype)).to(input.dtype)
        statistics = _cast(self.running_mean, input), _cast(self.running_var, input)
        return F.batch_norm(input, *statistics, _cast(self.weight, input), _cast(self.bias, input), eps=self.eps)


def _cast(parameter: Tensor | None, like: Tensor) -> Any:
    return None if parameter is None else parameter.to(like.dtype)


def batch_norm(layer: nn.Module, x: Tensor) -> Tensor:
    """Applies a BatchNorm to x (B, N, H, W), without updating its running statistics when gradient checkpointing
    recomputes the forward pass.

    torch's own layer would count a recomputed batch twice.

    Args:
        layer: a CastBatchNorm2d, or the nn.SyncBatchNorm it was converted to.

    Raises:
        InputError: training with one value per channel, which has no variance.
    """
    if layer.training and x.shape[0] * x.shape[2] * x.shape[3] < 2:
        raise InputError("batches must have 2 images or more for the unit's BatchNorm, got one value per channel")
    with running_statistics_kept(layer) if layer.training and recomputing() else nullcontext():
        return layer(x)


@contextmanager
def running_statistics_kept(layer: nn.Module) -> Iterator[None]:
    """Restores the layer's running statistics at exit."""
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
    """Whether this forward pass runs within a backward pass, as when gradient checkpointing recomputes it."""
    # When compiled, the two forward passes are one graph, which updates the statistics once.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_map(features: Tensor) -> bool:
    """Whether features are maps (B, N, H, W) rather than tokens (B, L, N). Raises InputError for other shapes."""
    if features.dim() not in (3, 4):
        raise InputError(f"features must have shape (B, L, N) or (B, N, H, W), got {tuple(features.shape)}")
    return features.dim() == 4


def statistics_dtype(features: Tensor) -> torch.dtype:
    """float32 for half precision, else the features' own dtype."""
    return torch.promote_types(features.dtype, torch.float32)


def mean_pool(features: Tensor, num_unpooled_tokens: int = 0) -> Tensor:
    """Global average pooling (GAP), (B, N), of maps or of all but the leading tokens."""
    dtype = statistics_dtype(features)
    if is_map(features):
        return features.mean(dim=(2, 3), dtype=dtype)
    return features[:, num_unpooled_tokens:].mean(dim=1, dtype=dtype)


def channels_first(features: Tensor, num_unpooled_tokens: int = 0) -> Tensor:
    """Features as (B, N, P), where P counts pixels, or all tokens but the leading ones."""
    if is_map(features):
        return features.flatten(2).to(statistics_dtype(features))
    return features[:, num_unpooled_tokens:].transpose(1, 2).to(statistics_dtype(features))


def grid(features: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """Maps as they are, or patch tokens as (B, N, H, W) with H = W, without the prefix tokens.

    Raises InputError if the number of patch tokens is not a square.
    """
    if is_map(features):
        return features.to(statistics_dtype(features))
    by_channel = channels_first(features, num_prefix_tokens)  # (B, N, P)
    side = math.isqrt(by_channel.shape[2])
    if side * side != by_channel.shape[2]:
        raise InputError(
            f"the patches must form a square grid for a unit with a spatial map, got {by_channel.shape[2]} tokens "
            f"after {num_prefix_tokens} prefix tokens"
        )
    return by_channel.unflatten(2, (side, side))


def recalibrate(features: Tensor, attention_map: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """Features times an attention map, in features' shape and dtype.

    Args:
        features: tokens (B, L, N) or maps (B, N, H, W).
        attention_map: broadcasts to (B, N), or a spatial map (B, G, H, W) over pixels or the grid of patches; each of
            the G channels scales N/G consecutive channels of the features.
        num_prefix_tokens: leading tokens (class, time), which a spatial map doesn't scale.
    """
    attention_map = attention_map.to(features.dtype)
    if attention_map.dim() < 4:
        return features * (attention_map[..., None, None] if is_map(features) else attention_map[..., None, :])
    groups = attention_map.shape[1]
    if is_map(features):
        return (features.unflatten(1, (groups, -1)) * attention_map[:, :, None]).flatten(1, 2)
    by_token = attention_map.flatten(2).transpose(1, 2)[..., None]  # (B, H W, G, 1)
    placed = features[:, num_prefix_tokens:].unflatten(2, (groups, -1)) * by_token
    return torch.cat([features[:, :num_prefix_tokens], placed.flatten(2)], dim=1)


def finite(name: str, value: float) -> float:
    """A unit's argument as a float. Raises InputError unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"`{name}` of the attention unit must be a finite number, got {value!r}")
    return float(value)
