"""Recalibration, the last of a unit's three parts: an attention map scales the channels (arXiv 2210.16101, Fig. 4)."""

import math

from torch import Tensor

from dia_diffusion.errors import InputError


def recalibrate(features: Tensor, attention_map: Tensor) -> Tensor:
    """Tokens (B, L, N) or maps (B, N, H, W) times an attention map that broadcasts to (B, N), in features' dtype."""
    attention_map = attention_map.to(features.dtype)
    if is_map(features):
        return features * attention_map[..., None, None]
    return features * attention_map[..., None, :]


def is_map(features: Tensor) -> bool:
    """Whether features are maps (B, N, H, W) rather than tokens (B, L, N). Raises InputError for other shapes."""
    if features.dim() not in (3, 4):
        raise InputError(f"features have shape {tuple(features.shape)}; accepted: (B, L, N) or (B, N, H, W)")
    return features.dim() == 4


def finite(name: str, value: float) -> float:
    """A unit's argument of that name as a float. Raises InputError for anything but a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"the attention unit's {name} is {value!r}; accepted: a finite number")
    return float(value)
