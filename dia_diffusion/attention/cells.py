"""The three LSTM cells of arXiv 2210.16101 (Fig. 6, III-C, III-D), each from (y, h, c) to gates.

A cell maps the pooled features y_t and the hidden state h_{t-1}, both (B, N), to the four gate inputs (B, 4 N), in
torch.nn.LSTMCell's order: input, forget, candidate, output. The recurrence itself is the same for all of them.
"""

import math

import torch
from torch import Tensor, nn

from dia_diffusion.attention.layers import CastLinear, bottleneck_width


class FullGates(nn.Module):
    """Standard LSTM: one full linear map an input, 8 N^2 + 8 N parameters."""

    def __init__(self, channels: int):
        super().__init__()
        self.from_input = CastLinear(channels, 4 * channels)
        self.from_hidden = CastLinear(channels, 4 * channels)
        # As torch.nn.LSTMCell starts; nn.Linear's default has the same bound, 1 / sqrt(N).

    def last_parameters(self) -> list[nn.Parameter]:
        """Those next to the gates: with all of them 0, so are the gates' inputs."""
        return [*self.from_input.parameters(), *self.from_hidden.parameters()]

    def forward(self, y: Tensor, h: Tensor) -> Tensor:
        return self.from_input(y) + self.from_hidden(h)  # (B, 4 N)


class BottleneckGates(nn.Module):
    """DIA-LSTM: Linear N -> N/r, ReLU, Linear N/r -> 4 N an input, 10 N^2/r + 2 N/r + 8 N parameters (III-C)."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        width = bottleneck_width(channels, reduction)
        self.reduce_input = CastLinear(channels, width)
        self.expand_input = CastLinear(width, 4 * channels)
        self.reduce_hidden = CastLinear(channels, width)
        self.expand_hidden = CastLinear(width, 4 * channels)

    def last_parameters(self) -> list[nn.Parameter]:
        """Those next to the gates: with all of them 0, so are the gates' inputs."""
        return [*self.expand_input.parameters(), *self.expand_hidden.parameters()]

    def forward(self, y: Tensor, h: Tensor) -> Tensor:
        from_input = self.expand_input(self.reduce_input(y).relu())
        from_hidden = self.expand_hidden(self.reduce_hidden(h).relu())
        return from_input + from_hidden  # (B, 4 N)


class LightGates(nn.Module):
    """DIA-LSTM (Light): Linear N -> N/r, ReLU, then four element-wise maps W * x + b an input (eq. 5).

    2 N^2/r + 2 N/r + 16 N parameters. The paper leaves open how the N/r values meet the N element-wise weights; its
    count leaves room for no weights between them, so the vector is repeated r times.
    """

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        width = bottleneck_width(channels, reduction)
        self.reduction = reduction
        self.reduce_input = CastLinear(channels, width)
        self.reduce_hidden = CastLinear(channels, width)
        self.input_weight = nn.Parameter(torch.empty(4 * channels))
        self.input_bias = nn.Parameter(torch.empty(4 * channels))
        self.hidden_weight = nn.Parameter(torch.empty(4 * channels))
        self.hidden_bias = nn.Parameter(torch.empty(4 * channels))
        # The variance that the linear map N/r -> N they replace starts with, sums over N/r inputs included.
        bound = math.sqrt(reduction / channels)
        for weight in (self.input_weight, self.hidden_weight):
            nn.init.uniform_(weight, -1.0, 1.0)
        for bias in (self.input_bias, self.hidden_bias):
            nn.init.uniform_(bias, -bound, bound)

    def last_parameters(self) -> list[nn.Parameter]:
        """Those next to the gates: with all of them 0, so are the gates' inputs."""
        return [self.input_weight, self.input_bias, self.hidden_weight, self.hidden_bias]

    def forward(self, y: Tensor, h: Tensor) -> Tensor:
        repeats = 4 * self.reduction  # r times to N channels, once for each of the four gates
        from_input = self.reduce_input(y).relu().repeat(1, repeats)  # (B, 4 N)
        from_hidden = self.reduce_hidden(h).relu().repeat(1, repeats)
        return (
            from_input * self.input_weight.to(y.dtype)
            + self.input_bias.to(y.dtype)
            + from_hidden * self.hidden_weight.to(y.dtype)
            + self.hidden_bias.to(y.dtype)
        )


Gates = FullGates | BottleneckGates | LightGates
