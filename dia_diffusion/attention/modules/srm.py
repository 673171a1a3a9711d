"""SRM: style-based recalibration module (Lee, Kim and Nam, ICCV 2019, arXiv 1903.10829)."""

import torch
from torch import Tensor, nn

from dia_diffusion.attention.extraction import positions
from dia_diffusion.attention.modules.base import Norm, OneMapModule

VARIANCE_FLOOR = 1e-5  # keeps the gradient of the deviation finite where a channel is constant


class StyleRecalibration(OneMapModule):
    """Style pooling and style integration (Section 3), 2 N parameters and a BatchNorm of 2 N.

        z_n = w_n . (mean_n, deviation_n),  map = sigmoid(BatchNorm(z))

    The channel-wise weights start at 0, as in the published code, and so the map at 1/2.

    Args:
        channels: N.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm_channels = channels
        self.weight = nn.Parameter(torch.zeros(channels, 2))

    def extract(self, features: Tensor, num_unpooled_tokens: int, num_extra_tokens: int) -> Tensor:
        by_channel = positions(features, num_unpooled_tokens)  # (B, N, P)
        variance, mean = torch.var_mean(by_channel, dim=2, correction=0)
        return torch.stack([mean, (variance + VARIANCE_FLOOR).sqrt()], dim=2)  # (B, N, 2)

    def process(self, extracted: Tensor, norm: Norm | None) -> Tensor:
        assert norm is not None
        style = (extracted * self.weight.to(extracted.dtype)).sum(dim=2)  # (B, N)
        return norm(style[..., None, None])[..., 0, 0].sigmoid()
