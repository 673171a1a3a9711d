"""SE: squeeze and excitation (Hu, Shen and Sun, CVPR 2018, arXiv 1709.01507)."""

from torch import Tensor, nn

from dia_diffusion.attention.extraction import mean_pool
from dia_diffusion.attention.layers import CastLinear, bottleneck_width
from dia_diffusion.attention.modules.base import Norm, OneMapModule
from dia_diffusion.attention.recalibration import finite


class SqueezeExcitation(OneMapModule):
    """scale * sigmoid(W2 relu(W1 GAP(a))) (eq. 2 and 3), 2 N^2/r + N/r + N parameters with biases.

    Args:
        channels: N.
        reduction: r; must divide N.
        bias: biases on both maps, as in the published networks.
        scale: what the sigmoid is multiplied by, 1 in the paper.
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

    def extract(self, features: Tensor, num_unpooled_tokens: int, num_extra_tokens: int) -> Tensor:
        return mean_pool(features, num_unpooled_tokens)

    def process(self, extracted: Tensor, norm: Norm | None) -> Tensor:
        return self.expand(self.reduce(extracted).relu()).sigmoid() * self.scale
