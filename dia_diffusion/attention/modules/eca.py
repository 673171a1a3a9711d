"""ECA: efficient channel attention (Wang et al., CVPR 2020, arXiv 1910.03151)."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from dia_diffusion.attention.extraction import mean_pool
from dia_diffusion.attention.modules.base import Norm, OneMapModule
from dia_diffusion.errors import InputError


def eca_kernel_size(channels: int) -> int:
    """|log2(N) / gamma + b / gamma| made odd, with gamma 2 and b 1 (eq. 12)."""
    size = int(abs((math.log2(channels) + 1) / 2))
    return size if size % 2 else size + 1


class ChannelConvolution(nn.Conv1d):
    """A convolution without bias along the channels of pooled features (B, N), k parameters."""

    def __init__(self, kernel_size: int):
        super().__init__(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.conv1d(input[:, None], self.weight.to(input.dtype), padding=self.padding)[:, 0]


class EfficientChannelAttention(OneMapModule):
    """sigmoid(conv_k(GAP(a))), the convolution along the channels (eq. 9), k parameters.

    Args:
        channels: N.
        kernel_size: k, odd; None is the paper's function of N.

    Raises:
        InputError: an even kernel_size.
    """

    def __init__(self, channels: int, kernel_size: int | None = None):
        super().__init__()
        size = eca_kernel_size(channels) if kernel_size is None else kernel_size
        if size < 1 or size % 2 == 0:
            raise InputError(f"kernel_size is {kernel_size}; accepted: an odd number, or null for the paper's")
        self.conv = ChannelConvolution(size)

    def extract(self, features: Tensor, num_unpooled_tokens: int, num_extra_tokens: int) -> Tensor:
        return mean_pool(features, num_unpooled_tokens)

    def process(self, extracted: Tensor, norm: Norm | None) -> Tensor:
        return self.conv(extracted).sigmoid()
