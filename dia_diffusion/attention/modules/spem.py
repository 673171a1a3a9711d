"""SPEM: self-adaptive pooling enhanced attention module (Zhong, Wen and Qin, arXiv 2208.10322)."""

import torch
from torch import Tensor, nn

from dia_diffusion.attention.extraction import positions
from dia_diffusion.attention.modules.base import Norm, OneMapModule


class MixPoolingAttention(OneMapModule):
    """A learned mixture of max and min pooling, with an affine map a channel in place of layers.

        u = w2 max(a) + b2,  v = w2 min(a) + b2,  (p, q) = l^2 / sum(l^2)
        map = sigmoid(u + v) * sigmoid(w1 (p u + q v) + b1)

    4 N + 2 parameters, starting as in the published code: w at 0, b at -1, l at 1/2. The paper's penalty on l in the
    loss is left out: the mixture doesn't depend on l's length.

    Args:
        channels: N.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.pooling = nn.Parameter(torch.full((2,), 0.5))
        self.pooled_weight = nn.Parameter(torch.zeros(channels))
        self.pooled_bias = nn.Parameter(torch.full((channels,), -1.0))
        self.mixed_weight = nn.Parameter(torch.zeros(channels))
        self.mixed_bias = nn.Parameter(torch.full((channels,), -1.0))

    def extract(self, features: Tensor, num_unpooled_tokens: int, num_extra_tokens: int) -> Tensor:
        by_channel = positions(features, num_unpooled_tokens)  # (B, N, P)
        return torch.stack([by_channel.amax(dim=2), by_channel.amin(dim=2)], dim=1)  # (B, 2, N)

    def process(self, extracted: Tensor, norm: Norm | None) -> Tensor:
        dtype = extracted.dtype
        extremes = extracted * self.pooled_weight.to(dtype) + self.pooled_bias.to(dtype)  # (B, 2, N)
        shares = self.pooling.to(dtype).square()
        mixed = ((shares / shares.sum())[:, None] * extremes).sum(dim=1)  # (B, N)
        excited = mixed * self.mixed_weight.to(dtype) + self.mixed_bias.to(dtype)
        return extremes.sum(dim=1).sigmoid() * excited.sigmoid()
