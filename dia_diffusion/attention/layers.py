"""Parts that attention units are built of: layers, extraction and recalibration (arXiv 2210.16101, Fig. 4).

Features are tokens (B, L, N) or maps (B, N, H, W). Statistics are float32, or float64 of float64 features. Layers
compute in the precision of their input, by casting weights in their forward, so that what replaces or hooks a module
(LoRA, offloading) works on them.
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


def is_map(features: Tensor) -> bool:
    """Whether features are maps (B, N, H, W) rather than tokens (B, L, N). Raises InputError for other shapes."""
    if features.dim() not in (3, 4):
        raise InputError(f"features have shape {tuple(features.shape)}; accepted: (B, L, N) or (B, N, H, W)")
    return features.dim() == 4


def statistics_dtype(features: Tensor) -> torch.dtype:
    """float32 of half precisions."""
    return torch.promote_types(features.dtype, torch.float32)


def mean_pool(features: Tensor, num_unpooled_tokens: int = 0) -> Tensor:
    """Global average pooling (GAP), (B, N), of maps or of all but the leading tokens."""
    dtype = statistics_dtype(features)
    if is_map(features):
        return features.mean(dim=(2, 3), dtype=dtype)
    return features[:, num_unpooled_tokens:].mean(dim=1, dtype=dtype)


def positions(features: Tensor, num_unpooled_tokens: int = 0) -> Tensor:
    """The same features by channel, (B, N, P): pixels, or all but the leading tokens."""
    if is_map(features):
        return features.flatten(2).to(statistics_dtype(features))
    return features[:, num_unpooled_tokens:].transpose(1, 2).to(statistics_dtype(features))


def grid(features: Tensor, num_extra_tokens: int = 0) -> Tensor:
    """Maps as they are, or tokens as (B, N, H, W) with H = W, without the leading ones that lie on no grid.

    Raises:
        InputError: the tokens are not as many as a square has.
    """
    if is_map(features):
        return features.to(statistics_dtype(features))
    by_channel = positions(features, num_extra_tokens)  # (B, N, P)
    side = math.isqrt(by_channel.shape[2])
    if side * side != by_channel.shape[2]:
        raise InputError(
            f"{by_channel.shape[2]} tokens, {num_extra_tokens} leading ones left out, are no square grid; "
            "accepted: square images for a unit with a spatial part"
        )
    return by_channel.unflatten(2, (side, side))


def recalibrate(features: Tensor, attention_map: Tensor, num_extra_tokens: int = 0) -> Tensor:
    """Features times an attention map, in features' shape and dtype.

    Args:
        features: tokens (B, L, N) or maps (B, N, H, W).
        attention_map: what broadcasts to (B, N), or a map over places (B, G, H, W), of tokens over their grid, each of
            whose G channels scales N/G consecutive ones.
        num_extra_tokens: leading tokens on no grid, which a map over places leaves as they are.
    """
    attention_map = attention_map.to(features.dtype)
    if attention_map.dim() < 4:
        return features * (attention_map[..., None, None] if is_map(features) else attention_map[..., None, :])
    groups = attention_map.shape[1]
    if is_map(features):
        return (features.unflatten(1, (groups, -1)) * attention_map[:, :, None]).flatten(1, 2)
    by_token = attention_map.flatten(2).transpose(1, 2)[..., None]  # (B, H W, G, 1)
    placed = features[:, num_extra_tokens:].unflatten(2, (groups, -1)) * by_token
    return torch.cat([features[:, :num_extra_tokens], placed.flatten(2)], dim=1)


def finite(name: str, value: float) -> float:
    """A unit's argument of that name as a float. Raises InputError for anything but a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"the attention unit's {name} is {value!r}; accepted: a finite number")
    return float(value)
