"""CBAM: convolutional block attention module (Woo et al., ECCV 2018, arXiv 1807.06521)."""

import torch
from torch import Tensor

from dia_diffusion.attention.extraction import grid, positions
from dia_diffusion.attention.layers import CastConv2d, CastLinear, bottleneck_width
from dia_diffusion.attention.modules.base import Norm, SelfAttentionModule
from dia_diffusion.attention.recalibration import recalibrate


class ConvolutionalBlockAttention(SelfAttentionModule):
    """A map over channels (eq. 2), then one over places (eq. 3) of the features that the first has scaled.

        channel = sigmoid(MLP(mean a) + MLP(max a)),  place = sigmoid(conv7x7([mean over N, max over N]))

    2 N^2/r + N/r + N + 98 parameters with biases. Tokens on no grid are scaled by the channel map alone.

    Args:
        channels: N.
        reduction: r; must divide N.
        bias: biases in the MLP, as in the published code.
        spatial_norm: a BatchNorm after the convolution, as in the published code; the paper's equation has none.

    Raises:
        InputError: r does not divide N.
    """

    def __init__(self, channels: int, reduction: int = 16, bias: bool = True, spatial_norm: bool = False):
        super().__init__()
        width = bottleneck_width(channels, reduction)
        self.norm_channels = 1 if spatial_norm else None
        self.reduce = CastLinear(channels, width, bias=bias)
        self.expand = CastLinear(width, channels, bias=bias)
        self.conv = CastConv2d(2, 1, kernel_size=7, padding=3, bias=False)

    def forward(
        self, features: Tensor, norm: Norm | None, num_unpooled_tokens: int, num_extra_tokens: int
    ) -> tuple[Tensor, ...]:
        by_channel = positions(features, num_unpooled_tokens)  # (B, N, P)
        channel = (self._mlp(by_channel.mean(dim=2)) + self._mlp(by_channel.amax(dim=2))).sigmoid()  # (B, N)
        refined = recalibrate(grid(features, num_extra_tokens), channel)  # (B, N, H, W)
        described = torch.cat([refined.mean(dim=1, keepdim=True), refined.amax(dim=1, keepdim=True)], dim=1)
        place = self.conv(described)  # (B, 1, H, W)
        if norm is not None:
            place = norm(place)
        return channel, place.sigmoid()

    def _mlp(self, pooled: Tensor) -> Tensor:
        return self.expand(self.reduce(pooled).relu())
