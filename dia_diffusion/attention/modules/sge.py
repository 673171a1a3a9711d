"""SGE: spatial group-wise enhance (Li, Hu and Yang, arXiv 1905.09646)."""

import math

import torch
from torch import Tensor, nn

from dia_diffusion.attention.extraction import grid
from dia_diffusion.attention.modules.base import Norm, OneMapModule
from dia_diffusion.errors import InputError

DEVIATION_FLOOR = 1e-5  # the paper's epsilon


class SpatialGroupEnhance(OneMapModule):
    """A map over places for each group of consecutive channels: how much a place is like the group's mean.

        c_i = GAP(group) . x_i,  map_i = sigmoid(gamma (c_i - mean c) / (deviation c + eps) + beta)

    2 G parameters; gamma starts at 0 and beta at 1, as in the published code. Purely spatial: tokens on no grid are
    left as they are.

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
            raise InputError(f"groups {groups} does not divide the {channels} channels; use a divisor of {channels}")
        self.gamma = nn.Parameter(torch.zeros(groups))
        self.beta = nn.Parameter(torch.ones(groups))

    def extract(self, features: Tensor, num_unpooled_tokens: int, num_extra_tokens: int) -> Tensor:
        grouped = grid(features, num_extra_tokens).unflatten(1, (len(self.gamma), -1))  # (B, G, N/G, H, W)
        means = grouped.mean(dim=(3, 4), keepdim=True)
        return (grouped * means).sum(dim=2)  # (B, G, H, W)

    def process(self, extracted: Tensor, norm: Norm | None) -> Tensor:
        variance, mean = torch.var_mean(extracted, dim=(2, 3), correction=0, keepdim=True)
        # The floor within the root too, whose gradient is infinite where all places are alike.
        normalized = (extracted - mean) / ((variance + DEVIATION_FLOOR**2).sqrt() + DEVIATION_FLOOR)
        gamma, beta = (p.to(extracted.dtype)[:, None, None] for p in (self.gamma, self.beta))
        return (gamma * normalized + beta).sigmoid()  # (B, G, H, W)
