"""Recalibration, the last of a unit's three parts: an attention map scales the features (arXiv 2210.16101, Fig. 4)."""

import math

import torch
from torch import Tensor

from dia_diffusion.attention.extraction import is_map
from dia_diffusion.errors import InputError


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
