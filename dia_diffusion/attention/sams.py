"""Self-attention modules (SAMs): extraction and processing in a block (arXiv 2210.16101, Fig. 4, Table II)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_diffusion.attention.layers import (
    CastConv2d,
    CastLinear,
    bottleneck_width,
    channels_first,
    finite,
    grid,
    mean_pool,
    recalibrate,
)
from dia_diffusion.errors import InputError

Norm = Callable[[Tensor], Tensor]  # (B, N, H, W) to the same shape


class SelfAttentionModule(nn.Module, ABC):
    """One block's module: extraction and processing. Recalibration, the third part, is the same for all of them.

    Subclasses are built as `Subclass(channels, **options)`.
    """

    norm_channels: int | None = None
    """Channels of the BatchNorm between processing and map; None if there is none. The unit holds the BatchNorm, since
    each block needs its own statistics even if everything else is shared (VI-B2)."""

    @abstractmethod
    def forward(
        self, features: Tensor, norm: Norm | None, num_unpooled_tokens: int, num_prefix_tokens: int
    ) -> tuple[Tensor, ...]:
        """Returns the maps that scale the features by their product. Arguments as in SelfAttentionUnit.forward."""


class OneMapModule(SelfAttentionModule):
    """A module with one map: extraction, then processing."""

    def extract(self, features: Tensor, num_unpooled_tokens: int, num_prefix_tokens: int) -> Tensor:
        """Statistics of tokens (B, L, N) or maps (B, N, H, W), in float32 or float64: their mean, unless overridden."""
        return mean_pool(features, num_unpooled_tokens)

    @abstractmethod
    def process(self, extracted: Tensor, norm: Norm | None) -> Tensor:
        """The attention map: (B, N), or (B, G, H, W) where G divides N."""

    def forward(
        self, features: Tensor, norm: Norm | None, num_unpooled_tokens: int, num_prefix_tokens: int
    ) -> tuple[Tensor, ...]:
        return (self.process(self.extract(features, num_unpooled_tokens, num_prefix_tokens), norm),)


class SqueezeExcitation(OneMapModule):
    """scale * sigmoid(W2 relu(W1 GAP(a))) (eq. 2 and 3), 2 N^2/r + N/r + N parameters with biases.

    Args:
        channels: N.
        reduction: r; must divide N.
        bias: biases on both maps, as in the published networks.
        scale: factor of the sigmoid, 1 in the paper.
        zero_init: W2 starts at 0, so that with scale 2 the map starts at exactly 1.

    Raises:
        InputError: r does not divide N, or scale is not a finite number.
    """

    def __init__(
        self, channels: int, reduction: int = 16, bias: bool = True, scale: float = 1.0, zero_init: bool = False
    ):
        super().__init__()
        self.scale = finite("scale", scale)
        width = bottleneck_width(channels, reduction)
        self.reduce = CastLinear(channels, width, bias=bias)
        self.expand = CastLinear(width, channels, bias=bias)
        if zero_init:
            for parameter in self.expand.parameters():
                nn.init.zeros_(parameter)

    def process(self, extracted: Tensor, norm: Norm | None) -> Tensor:
        return self.expand(self.reduce(extracted).relu()).sigmoid() * self.scale


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
            raise InputError(f"`kernel_size` must be odd, or null for the paper's, got {kernel_size}")
        self.conv = ChannelConvolution(size)

    def process(self, extracted: Tensor, norm: Norm | None) -> Tensor:
        return self.conv(extracted).sigmoid()


class ConvolutionalBlockAttention(SelfAttentionModule):
    """A channel map (eq. 2), then a spatial map (eq. 3) of the features scaled by the first.

        channel = sigmoid(MLP(mean a) + MLP(max a)),  spatial = sigmoid(conv7x7([mean over N, max over N]))

    2 N^2/r + N/r + N + 98 parameters with biases. Prefix tokens are scaled only by the channel map.

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
        self, features: Tensor, norm: Norm | None, num_unpooled_tokens: int, num_prefix_tokens: int
    ) -> tuple[Tensor, ...]:
        by_channel = channels_first(features, num_unpooled_tokens)  # (B, N, P)
        channel = (self._mlp(by_channel.mean(dim=2)) + self._mlp(by_channel.amax(dim=2))).sigmoid()  # (B, N)
        refined = recalibrate(grid(features, num_prefix_tokens), channel)  # (B, N, H, W)
        described = torch.cat([refined.mean(dim=1, keepdim=True), refined.amax(dim=1, keepdim=True)], dim=1)
        spatial = self.conv(described)  # (B, 1, H, W)
        if norm is not None:
            spatial = norm(spatial)
        return channel, spatial.sigmoid()

    def _mlp(self, pooled: Tensor) -> Tensor:
        return self.expand(self.reduce(pooled).relu())


VARIANCE_FLOOR = 1e-5  # keeps the gradient of the deviation finite for constant channels


class StyleRecalibration(OneMapModule):
    """Style pooling and style integration (Section 3), 2 N parameters and a BatchNorm of 2 N.

        z_n = w_n . (mean_n, deviation_n),  map = sigmoid(BatchNorm(z))

    The channel-wise weights start at 0, as in the published code, so the map starts at 1/2.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm_channels = channels
        self.weight = nn.Parameter(torch.zeros(channels, 2))

    def extract(self, features: Tensor, num_unpooled_tokens: int, num_prefix_tokens: int) -> Tensor:
        by_channel = channels_first(features, num_unpooled_tokens)  # (B, N, P)
        variance, mean = torch.var_mean(by_channel, dim=2, correction=0)
        return torch.stack([mean, (variance + VARIANCE_FLOOR).sqrt()], dim=2)  # (B, N, 2)

    def process(self, extracted: Tensor, norm: Norm | None) -> Tensor:
        assert norm is not None
        style = (extracted * self.weight.to(extracted.dtype)).sum(dim=2)  # (B, N)
        return norm(style[..., None, None])[..., 0, 0].sigmoid()


PYRAMID = (1, 2, 4)  # sides of the adaptive average pools


class SpatialPyramidAttention(OneMapModule):
    """sigmoid(W2 relu(W1 p)) of p, the concatenated pools of sides 1, 2 and 4: 22 N^2/r parameters without biases.

    Pools over the grid of patches: prefix tokens are left out regardless of `num_unpooled_tokens`.

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

    def extract(self, features: Tensor, num_unpooled_tokens: int, num_prefix_tokens: int) -> Tensor:
        placed = grid(features, num_prefix_tokens)
        return torch.cat([F.adaptive_avg_pool2d(placed, side).flatten(1) for side in PYRAMID], dim=1)  # (B, 21 N)

    def process(self, extracted: Tensor, norm: Norm | None) -> Tensor:
        return self.expand(self.reduce(extracted).relu()).sigmoid()


class SwitchableAttention(OneMapModule):
    """Three excitation operators of y = GAP(a), each weighted by a decision on the same y.

        map = sigmoid(d_1 W2 relu(W1 y)) * sigmoid(d_2 conv_k(y)) * sigmoid(d_3 (w y + b)),  d = sigmoid(D y)

    The operators are those of SE and ECA, and IEBN's instance enhancement. 2 N^2/r + N/r + 6 N + 3 + k parameters. As
    in the published code, w starts at 0 and b at -1.

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

    def process(self, extracted: Tensor, norm: Norm | None) -> Tensor:
        decisions = self.decide(extracted).sigmoid()  # (B, 3)
        fully_connected = self.expand(self.reduce(extracted).relu())
        enhanced = extracted * self.weight.to(extracted.dtype) + self.bias.to(extracted.dtype)
        operators = torch.stack([fully_connected, self.conv(extracted), enhanced], dim=1)  # (B, 3, N)
        return (decisions[..., None] * operators).sigmoid().prod(dim=1)


class MixPoolingAttention(OneMapModule):
    """A learned mixture of max and min pooling, with an affine map per channel in place of layers.

        u = w2 max(a) + b2,  v = w2 min(a) + b2,  (p, q) = l^2 / sum(l^2)
        map = sigmoid(u + v) * sigmoid(w1 (p u + q v) + b1)

    4 N + 2 parameters, initialized as in the published code: w at 0, b at -1, l at 1/2. The paper's penalty on l in the
    loss is left out, since the mixture doesn't depend on the norm of l.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.pooling = nn.Parameter(torch.full((2,), 0.5))
        self.pooled_weight = nn.Parameter(torch.zeros(channels))
        self.pooled_bias = nn.Parameter(torch.full((channels,), -1.0))
        self.mixed_weight = nn.Parameter(torch.zeros(channels))
        self.mixed_bias = nn.Parameter(torch.full((channels,), -1.0))

    def extract(self, features: Tensor, num_unpooled_tokens: int, num_prefix_tokens: int) -> Tensor:
        by_channel = channels_first(features, num_unpooled_tokens)  # (B, N, P)
        return torch.stack([by_channel.amax(dim=2), by_channel.amin(dim=2)], dim=1)  # (B, 2, N)

    def process(self, extracted: Tensor, norm: Norm | None) -> Tensor:
        dtype = extracted.dtype
        extremes = extracted * self.pooled_weight.to(dtype) + self.pooled_bias.to(dtype)  # (B, 2, N)
        shares = self.pooling.to(dtype).square()
        mixed = ((shares / shares.sum())[:, None] * extremes).sum(dim=1)  # (B, N)
        excited = mixed * self.mixed_weight.to(dtype) + self.mixed_bias.to(dtype)
        return extremes.sum(dim=1).sigmoid() * excited.sigmoid()


DEVIATION_FLOOR = 1e-5  # the paper's epsilon


class SpatialGroupEnhance(OneMapModule):
    """A spatial map for each group of consecutive channels: the similarity of each position to the group's mean.

        c_i = GAP(group) . x_i,  map_i = sigmoid(gamma (c_i - mean c) / (deviation c + eps) + beta)

    2 G parameters; gamma starts at 0 and beta at 1, as in the published code. Purely spatial:
    prefix tokens are not scaled.

    Args:
        channels: N.
        groups: G; must divide N. None is gcd(64, N), which is the paper's 64 in its ResNets.

    Raises:
        InputError: G does not divide N.
    """

    def __init__(self, channels: int, groups: int | None = None):
        super().__init__()
        groups = math.gcd(64, channels) if groups is None else groups
        if groups < 1 or channels % groups:
            raise InputError(f"`groups` must divide the {channels} channels, got {groups}")
        self.gamma = nn.Parameter(torch.zeros(groups))
        self.beta = nn.Parameter(torch.ones(groups))

    def extract(self, features: Tensor, num_unpooled_tokens: int, num_prefix_tokens: int) -> Tensor:
        grouped = grid(features, num_prefix_tokens).unflatten(1, (len(self.gamma), -1))  # (B, G, N/G, H, W)
        means = grouped.mean(dim=(3, 4), keepdim=True)
        return (grouped * means).sum(dim=2)  # (B, G, H, W)

    def process(self, extracted: Tensor, norm: Norm | None) -> Tensor:
        variance, mean = torch.var_mean(extracted, dim=(2, 3), correction=0, keepdim=True)
        # The floor is also inside the root: its gradient is infinite if all positions are equal.
        normalized = (extracted - mean) / ((variance + DEVIATION_FLOOR**2).sqrt() + DEVIATION_FLOOR)
        gamma, beta = (p.to(extracted.dtype)[:, None, None] for p in (self.gamma, self.beta))
        return (gamma * normalized + beta).sigmoid()  # (B, G, H, W)
