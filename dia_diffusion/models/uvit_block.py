"""A block of U-ViT (Bao et al., CVPR 2023), with a place for the shared attention unit between its Norm and its MLP.

What it can leave out, residual additions and LayerNorms, is what arXiv 2210.16101, VI-A2, takes from a network to see
who still trains.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention, (B, heads, L, D) each, in the precision of the inputs."""
    trains_in_half = q.requires_grad and torch.is_grad_enabled() and q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type != "cpu" or not trains_in_half:
        return F.scaled_dot_product_attention(q, k, v)
    # Backward in bfloat16, torch's CPU kernel takes up to 7 times as long as this (table in docs/results/speed.md).
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, L, L)
    with torch.autocast("cpu", enabled=False):  # which would keep the weights in float32; the kernel sums in it anyway
        weights = weights.softmax(dim=-1)
    return weights @ v


def in_autocast_dtype(x: Tensor) -> Tensor:
    """x as matrix products take it under the autocast that is on; without one, as it is."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "B L (K H D) -> K B H L D", K=3, H=self.num_heads)
        return self.proj(rearrange(softmax_attention(q, k, v), "B H L D -> B L (H D)"))


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A transformer block; the unit it is handed stands between the second norm and the MLP.

    Args:
        dim: width N of the tokens.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over dim.
        qkv_bias: a bias on queries, keys and values.
        long_skip: joins the tokens of an in block to its own.
        residual: adds attention and MLP to what they are given; without, each takes its place.
        layer_norm: norms before attention and MLP; without, both see the tokens as they are.
        carries_unit: whether it calls the unit; without, features and state pass by.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        *,
        long_skip: bool = False,
        residual: bool = True,
        layer_norm: bool = True,
        carries_unit: bool = True,
    ):
        super().__init__()
        self.residual, self.carries_unit = residual, carries_unit
        self.skip_linear = nn.Linear(2 * dim, dim) if long_skip else None
        self.norm1 = nn.LayerNorm(dim) if layer_norm else nn.Identity()
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim) if layer_norm else nn.Identity()
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        unit: Callable[[Tensor, Any], tuple[Tensor, Any]] | None,
        state: Any,
        skip: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Runs the block.

        Args:
            x: (B, L, N).
            unit: (features, state) to (features, state); a function, as a hook that moves a block's arguments to a
                device would move a module too.
            state: what the unit returned in the last block.
            skip: (B, L, N), the tokens of the in block that the long skip starts from.
        """
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        attended = self.attn(self.norm1(x))
        x = x + attended if self.residual else attended
        # In the precision that the MLP will take anyway, so that the unit moves half as many bytes.
        features = in_autocast_dtype(self.norm2(x))  # (B, L, N)
        if unit is not None and self.carries_unit:
            features, state = unit(features, state)
        out = self.mlp(features)
        return x + out if self.residual else out, state
