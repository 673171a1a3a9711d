"""SPA: spatial pyramid attention (Guo et al., "SPANet", ICME 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dia_diffusion.attention.extraction import grid
from dia_diffusion.attention.layers import CastLinear, bottleneck_width
from dia_diffusion.attention.modules.base import Norm, OneMapModule

PYRAMID = (1, 2, 4)  # sides of the adaptive average pools


class SpatialPyramidAttention(OneMapModule):
    """sigmoid(W2 relu(W1 p)) of p, the concatenated pools of sides 1, 2 and 4: 22 N^2/r parameters without biases.

    Needs places, so that of tokens those on no grid are left out whatever is pooled elsewhere.

    Args:
        channels: N.
        reduction: r; must divide N.
        bias: biases on both maps.

    Raises:
        InputError: r does not divide N.
    """

    def __init__(self, channels: int, reduction: int = 16, bias: bool = False):
        super().__init__()
        width = bottleneck_width(channels, reduction)
        self.reduce = CastLinear(sum(side * side for side in PYRAMID) * channels, width, bias=bias)
        self.expand = CastLinear(width, channels, bias=bias)

    def extract(self, features: Tensor, num_unpooled_tokens: int, num_extra_tokens: int) -> Tensor:
        placed = grid(features, num_extra_tokens)
        return torch.cat([F.adaptive_avg_pool2d(placed, side).flatten(1) for side in PYRAMID], dim=1)  # (B, 21 N)

    def process(self, extracted: Tensor, norm: Norm | None) -> Tensor:
        return self.expand(self.reduce(extracted).relu()).sigmoid()
