"""DIA-LSTM: one self-attention module shared by all blocks, an LSTM along depth (arXiv 2210.16101, eq. 2 and 4).

A cell (Fig. 6, III-C, III-D) maps the pooled features y_t and the hidden state h_{t-1}, both (B, N), to the four gate
inputs (B, 4 N), in torch.nn.LSTMCell's order: input, forget, candidate, output. All cells have the same recurrence.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dia_diffusion.attention.layers import CastLinear, bottleneck_width, finite, mean_pool, recalibrate
from dia_diffusion.errors import InputError


class FullGates(nn.Module):
    """Standard LSTM: one full linear map per input, 8 N^2 + 8 N parameters."""

    def __init__(self, channels: int):
        super().__init__()
        self.from_input = CastLinear(channels, 4 * channels)
        self.from_hidden = CastLinear(channels, 4 * channels)
        # nn.Linear's default initialization has the same bound as torch.nn.LSTMCell's, 1 / sqrt(N).

    def last_parameters(self) -> list[nn.Parameter]:
        """The parameters just before the gates: if all are 0, so are the gates' inputs."""
        return [*self.from_input.parameters(), *self.from_hidden.parameters()]

    def forward(self, y: Tensor, h: Tensor) -> Tensor:
        return self.from_input(y) + self.from_hidden(h)  # (B, 4 N)


class BottleneckGates(nn.Module):
    """DIA-LSTM: Linear N -> N/r, ReLU, Linear N/r -> 4 N per input, 10 N^2/r + 2 N/r + 8 N parameters (III-C)."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        width = bottleneck_width(channels, reduction)
        self.reduce_input = CastLinear(channels, width)
        self.expand_input = CastLinear(width, 4 * channels)
        self.reduce_hidden = CastLinear(channels, width)
        self.expand_hidden = CastLinear(width, 4 * channels)

    def last_parameters(self) -> list[nn.Parameter]:
        return [*self.expand_input.parameters(), *self.expand_hidden.parameters()]

    def forward(self, y: Tensor, h: Tensor) -> Tensor:
        from_input = self.expand_input(self.reduce_input(y).relu())
        from_hidden = self.expand_hidden(self.reduce_hidden(h).relu())
        return from_input + from_hidden  # (B, 4 N)


class LightGates(nn.Module):
    """DIA-LSTM (Light): Linear N -> N/r, ReLU, then four element-wise maps W * x + b per input (eq. 5).

    2 N^2/r + 2 N/r + 16 N parameters. The paper doesn't say how the N/r values are matched to the N element-wise
    weights; its count leaves no room for weights in between, so the vector is repeated r times.
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
        # Same initial variance as the linear map N/r -> N that these replace, including its sum over N/r inputs.
        bound = math.sqrt(reduction / channels)
        for weight in (self.input_weight, self.hidden_weight):
            nn.init.uniform_(weight, -1.0, 1.0)
        for bias in (self.input_bias, self.hidden_bias):
            nn.init.uniform_(bias, -bound, bound)

    def last_parameters(self) -> list[nn.Parameter]:
        return [self.input_weight, self.input_bias, self.hidden_weight, self.hidden_bias]

    def forward(self, y: Tensor, h: Tensor) -> Tensor:
        repeats = 4 * self.reduction  # r times for N channels, for each of the four gates
        from_input = self.reduce_input(y).relu().repeat(1, repeats)  # (B, 4 N)
        from_hidden = self.reduce_hidden(h).relu().repeat(1, repeats)
        return (
            from_input * self.input_weight.to(y.dtype)
            + self.input_bias.to(y.dtype)
            + from_hidden * self.hidden_weight.to(y.dtype)
            + self.hidden_bias.to(y.dtype)
        )


Gates = FullGates | BottleneckGates | LightGates


# The output activation of each cell in the paper; Table XIV compares others.
CELL_ACTIVATION = {"dia-lstm": "sigmoid", "dia-lstm-light": "sigmoid", "lstm": "tanh"}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
}
UNIT_INITIALIZATIONS = ("torch", "zero")

State = tuple[Tensor, Tensor]  # hidden states h and cell states c, each (num_cells, B, N), float32


class DIALSTM(nn.Module):
    """The shared unit: global average pooling, an LSTM step, channel-wise recalibration.

        (h_t, c_t) = LSTM(GAP(a_t), h_{t-1}, c_{t-1}),  h_0 = c_0 = 0;  returns a_t * h_t

    The model holds ONE instance and calls it in every block, passing each call the state that the previous one
    returned; the state runs along depth and is reset at each forward pass of the model.

    Args:
        channels: N, the channels of the features.
        reduction: r, the bottleneck's reduction ratio; must divide N. Not used by the cell "lstm".
        cell: "dia-lstm" (III-C), "dia-lstm-light" (III-D) or "lstm".
        activation: output activation, h = o * activation(c): "sigmoid", "tanh" or "relu"; None: the cell's default
            (tanh for "lstm", sigmoid for the others).
        num_cells: stacked cells (Table XIV). Only the first is a `cell`; the deeper ones use full linear maps, and
            their input is the hidden state of the cell below. The last cell's hidden state is the attention map.
        dropout: probability of dropping an element of a hidden state on its way to the next cell.
        scale: the features are multiplied by scale * h instead of h; the LSTM keeps h. With 4 and a sigmoid
            the unit starts near the identity instead of near a quarter.
        initialization: "torch" is torch's default, as in the published DIANet code; "zero" sets the maps just before
            the gates to 0, so that h starts at exactly 1/4 with a sigmoid (tanh and relu: 0) in every channel.
        sharing: only "shared", since one LSTM runs along all blocks.

    Raises:
        InputError: an unknown cell, activation or initialization, r not dividing N, or another sharing.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 4,
        cell: str = "dia-lstm",
        activation: str | None = None,
        num_cells: int = 1,
        dropout: float = 0.0,
        scale: float = 1.0,
        initialization: str = "torch",
        sharing: str = "shared",
    ):
        super().__init__()
        if sharing != "shared":
            raise InputError(f"`sharing` must be shared for {cell}, whose LSTM runs along the blocks, got {sharing!r}")
        if cell not in CELL_ACTIVATION:
            raise InputError(f"`cell` must be one of {', '.join(CELL_ACTIVATION)}, got {cell!r}")
        activation = activation or CELL_ACTIVATION[cell]
        if activation not in ACTIVATIONS:
            raise InputError(f"`activation` must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if num_cells < 1:
            raise InputError(f"`num_cells` must be 1 or more, got {num_cells}")
        if initialization not in UNIT_INITIALIZATIONS:
            names = ", ".join(UNIT_INITIALIZATIONS)
            raise InputError(f"`initialization` of the unit must be one of {names}, got {initialization!r}")
        self.channels = channels
        self.scale = finite("scale", scale)
        self.activation = ACTIVATIONS[activation]
        self.dropout = nn.Dropout(dropout)
        first: Gates
        if cell == "lstm":
            first = FullGates(channels)
        elif cell == "dia-lstm":
            first = BottleneckGates(channels, reduction)
        else:
            first = LightGates(channels, reduction)
        cells: list[Gates] = [first, *(FullGates(channels) for _ in range(num_cells - 1))]
        if initialization == "zero":
            for parameter in (parameter for gates in cells for parameter in gates.last_parameters()):
                nn.init.zeros_(parameter)
        self.cells = nn.ModuleList(cells)

    def forward(
        self, features: Tensor, state: State | None = None, num_unpooled_tokens: int = 0, num_prefix_tokens: int = 0
    ) -> tuple[Tensor, State]:
        """Recalibrates features by the attention map h_t.

        Args:
            features: a_t, tokens (B, L, N) or maps (B, N, H, W).
            state: what the previous block's call returned; None at the first block.
            num_unpooled_tokens: leading tokens (time, class) left out of the pooling; they are recalibrated too.
            num_prefix_tokens: leading tokens that are not patches; only units with a spatial map need it.

        Returns:
            (features * scale * h_t, in the shape and dtype of features; the state for the next block).
        """
        # Gates and state stay float32 under autocast, since the state accumulates over all blocks.
        with torch.autocast(features.device.type, enabled=False):
            state = self.step(mean_pool(features, num_unpooled_tokens), state)
        return recalibrate(features, self.attention_map(state)), state

    def attention_map(self, state: State) -> Tensor:
        """The map, (B, N) float32, that multiplied the features in the call that returned this state."""
        return state[0][-1] * self.scale

    def step(self, pooled: Tensor, state: State | None) -> State:
        """One LSTM step of all stacked cells from pooled features (B, N)."""
        if state is None:
            zeros = pooled.new_zeros(len(self.cells), *pooled.shape)
            state = zeros, zeros
        hidden, memory = [], []
        below = pooled
        for index, (gates, h, c) in enumerate(zip(self.cells, *state, strict=True)):
            below = below if index == 0 else self.dropout(below)
            i, f, g, o = gates(below, h).chunk(4, dim=1)  # each (B, N)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            below = o.sigmoid() * self.activation(c)
            hidden.append(below)
            memory.append(c)
        return torch.stack(hidden), torch.stack(memory)
