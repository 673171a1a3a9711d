"""Extraction, the first of a unit's three parts: what it reads of features (arXiv 2210.16101, Fig. 4).

Features are tokens (B, L, N) or maps (B, N, H, W). Statistics are float32, or float64 of float64 features: pixels are
many, and states add up over blocks.
"""

import math

import torch
from torch import Tensor

from dia_diffusion.errors import InputError


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
