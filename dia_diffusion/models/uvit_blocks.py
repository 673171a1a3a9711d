"""The blocks of U-ViT: attention, MLP, scaled long skips, and the place of the shared unit."""

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
    # In bfloat16, the backward pass of torch's CPU kernel takes up to 7 times as long (table in docs/results/speed.md).
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, L, L)
    with torch.autocast("cpu", enabled=False):  # it would keep the weights in float32, in which the kernel sums anyway
        weights = weights.softmax(dim=-1)
    return weights @ v


def in_autocast_dtype(x: Tensor) -> Tensor:
    """x in the dtype of the enabled autocast, if any."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class SkipCalibration(nn.Module):
    """ScaleLong's learned scaling (arXiv 2310.13545): one network for all long skips, a factor in (0, 1) per token.

    Tokens (B, L, N) are averaged over N; the factors are sigmoid(W2 relu(W1 mean + b1) + b2), with L/16 hidden units
    (at least 1). As in the official code, linear layers have torch's default initialization, so factors start near 1/2.

    Args:
        num_tokens: L.
    """

    def __init__(self, num_tokens: int):
        super().__init__()
        hidden = max(1, num_tokens // 16)
        self.fc1 = nn.Linear(num_tokens, hidden)
        self.fc2 = nn.Linear(hidden, num_tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """Factors (B, L, 1) of tokens (B, L, N)."""
        with torch.autocast(tokens.device.type, enabled=False):
            pooled = tokens.to(self.fc1.weight.dtype).mean(dim=-1)  # (B, L)
            return self.fc2(F.relu(self.fc1(pooled))).sigmoid()[..., None]


class HeadNorm(nn.RMSNorm):
    """RMSNorm over the last axis that computes in float32 and returns the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; qk_norm normalizes the queries and keys of each head."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, qk_norm: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = HeadNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "B L (K H D) -> K B H L D", K=3, H=self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
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
    """A transformer block; the unit goes between the second norm and the MLP.

    Args:
        dim: width N of the tokens.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over dim.
        qkv_bias: a bias on queries, keys and values.
        long_skip: concatenates the tokens of an in block to the input.
        residual: residual connections around attention and MLP.
        layer_norm: LayerNorms before attention and MLP.
        carries_unit: whether it calls the unit.
        qk_norm: RMSNorm on the queries and keys of each head.
        drop_path: probability that a residual branch is dropped.
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
        qk_norm: bool = False,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.residual, self.carries_unit, self.drop_path = residual, carries_unit, drop_path
        self.skip_linear = nn.Linear(2 * dim, dim) if long_skip else None
        self.norm1 = nn.LayerNorm(dim) if layer_norm else nn.Identity()
        self.attn = Attention(dim, num_heads, qkv_bias, qk_norm)
        self.norm2 = nn.LayerNorm(dim) if layer_norm else nn.Identity()
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        unit: Callable[[Tensor, Any], tuple[Tensor, Any]] | None,
        state: Any,
        skip: Tensor | None = None,
        skip_scale: Tensor | float | None = None,
        draws: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Runs the block.

        Args:
            x: (B, L, N).
            unit: (features, state) -> (features, state). A function, since a hook that moves a block's arguments to a
                device would also move a module.
            state: the state that the unit returned in the previous block.
            skip: (B, L, N), the output of the in block at the other end of the long skip.
            skip_scale: multiplies `skip`, a number or (B, L, 1).
            draws: (B, 2), uniform in [0, 1): the attention or MLP branch is dropped if its number is below drop_path;
                None drops nothing. The unit's state continues through a dropped branch.
        """
        if self.skip_linear is not None and skip is not None:
            skip = skip if skip_scale is None else skip * skip_scale
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        attended = self._dropped(self.attn(self.norm1(x)), draws, 0)
        x = x + attended if self.residual else attended
        # In the precision that the MLP uses anyway, so that the unit moves half as many bytes.
        features = in_autocast_dtype(self.norm2(x))  # (B, L, N)
        if unit is not None and self.carries_unit:
            features, state = unit(features, state)
        out = self._dropped(self.mlp(features), draws, 1)
        return x + out if self.residual else out, state

    def _dropped(self, branch: Tensor, draws: Tensor | None, column: int) -> Tensor:
        """The branch with dropped images set to zero, divided by the probability of keeping it."""
        if draws is None or self.drop_path == 0:
            return branch
        dropped = draws[:, column, None, None] < self.drop_path  # (B, 1, 1)
        return (branch / (1 - self.drop_path)).masked_fill(dropped, 0.0)
