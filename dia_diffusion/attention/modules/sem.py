"""SEM: switchable self-attention module (Zhong, Wen and Qin, arXiv 2209.05680)."""

import torch
from torch import Tensor, nn

from dia_diffusion.attention.extraction import mean_pool
from dia_diffusion.attention.layers import CastLinear, bottleneck_width
from dia_diffusion.attention.modules.base import Norm, OneMapModule
from dia_diffusion.attention.modules.eca import ChannelConvolution, eca_kernel_size


class SwitchableAttention(OneMapModule):
    """Three excitation operators of y = GAP(a), each weighted by a decision on the same y.

        map = sigmoid(d_1 W2 relu(W1 y)) * sigmoid(d_2 conv_k(y)) * sigmoid(d_3 (w y + b)),  d = sigmoid(D y)

    They are SE's, ECA's and the instance enhancement of IEBN. 2 N^2/r + N/r + 6 N + 3 + k parameters. As in the
    published code w starts at 0 and b at -1.

    Args:
        channels: N.
        reduction: r of SE's operator; must divide N.

    Raises:
        InputError: r does not divide N.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        width = bottleneck_width(channels, reduction)
        self.decide = CastLinear(channels, 3)
        self.reduce = CastLinear(channels, width)
        self.expand = CastLinear(width, channels)
        self.conv = ChannelConvolution(eca_kernel_size(channels))
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.full((channels,), -1.0))

    def extract(self, features: Tensor, num_unpooled_tokens: int, num_extra_tokens: int) -> Tensor:
        return mean_pool(features, num_unpooled_tokens)

    def process(self, extracted: Tensor, norm: Norm | None) -> Tensor:
        decisions = self.decide(extracted).sigmoid()  # (B, 3)
        fully_connected = self.expand(self.reduce(extracted).relu())
        enhanced = extracted * self.weight.to(extracted.dtype) + self.bias.to(extracted.dtype)
        operators = torch.stack([fully_connected, self.conv(extracted), enhanced], dim=1)  # (B, 3, N)
        return (decisions[..., None] * operators).sigmoid().prod(dim=1)
