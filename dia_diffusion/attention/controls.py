"""Controls for the shared unit: scales that don't see the features, to measure how much of its effect is attention.

DIA-LSTM's attention map starts near 0.25 in every channel of every block (both gates at zero: sigmoid(0) * sigmoid(0)).
Two controls start there too: one stays fixed, one learns a scalar or a per-channel vector per block. A third starts at
1 and also depends on the time: any effect of DIA-LSTM beyond this control needs the image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_diffusion.attention.layers import bottleneck_width, check_calls, finite, recalibrate


class FixedScale(nn.Module):
    """Multiplies every channel of every block by one constant.

    Args:
        channels: N; not used.
        scale: the constant.

    Raises:
        InputError: scale is not a finite number.
    """

    def __init__(self, channels: int, scale: float = 0.25):
        super().__init__()
        self.scale = finite("scale", scale)

    def forward(
        self, features: Tensor, state: None = None, num_unpooled_tokens: int = 0, num_prefix_tokens: int = 0
    ) -> tuple[Tensor, None]:
        """As in DIALSTM, but without a state."""
        return features * self.scale, None

    def attention_map(self, state: None) -> Tensor:
        """The constant, ()."""
        return torch.tensor(self.scale)


class BlockScale(nn.Module):
    """Multiplies each block by its own learned scalar or per-channel vector, the same for every image and time.

    AdamW decays these parameters like all others, so scales that don't affect the loss drift to `decay_to`.

    Args:
        channels: N, the channels of the features.
        num_blocks: calls per forward pass of the model.
        by_channel: a vector of N per block instead of a scalar.
        start: the initial value of every scale.
        decay_to: the value that weight decay pulls every scale to. The parameters are the scales minus this value.

    Raises:
        InputError: start or decay_to is not a finite number.
    """

    def __init__(
        self, channels: int, num_blocks: int, by_channel: bool = False, start: float = 0.25, decay_to: float = 0.0
    ):
        super().__init__()
        shape = (num_blocks, channels if by_channel else 1)
        self.decay_to = finite("decay_to", decay_to)
        self.scale = nn.Parameter(torch.full(shape, finite("start", start) - self.decay_to))

    def forward(
        self, features: Tensor, state: int | None = None, num_unpooled_tokens: int = 0, num_prefix_tokens: int = 0
    ) -> tuple[Tensor, int]:
        """As in DIALSTM, but the state is the number of calls so far."""
        state = (state or 0) + 1
        check_calls(state, len(self.scale))
        return recalibrate(features, self.attention_map(state)), state

    def attention_map(self, state: int) -> Tensor:
        """The scales of the call that returned this state, (N,) or (1,)."""
        return self.scale[state - 1] + self.decay_to


TimeState = tuple[int, Tensor]  # the calls so far, and the embedding of the time (B, N)


class BlockTimeScale(nn.Module):
    """Multiplies each block by a learned per-channel vector that depends on the time: DIA-LSTM without the features.

        s_l(t) = 1 + W_l SiLU(V e(t) + u) + b_l

    W_l and b_l start at 0, so the unit starts as the identity, and weight decay pulls it back there.

    Args:
        channels: N, the channels of the features and of the embedding e(t).
        num_blocks: calls per forward pass of the model.
        reduction: N divided by the hidden width; must divide N.

    Raises:
        InputError: reduction does not divide N.
    """

    def __init__(self, channels: int, num_blocks: int, reduction: int = 4):
        super().__init__()
        width = bottleneck_width(channels, reduction)
        self.hidden = nn.Linear(channels, width)
        self.weight = nn.Parameter(torch.zeros(num_blocks, channels, width))
        self.bias = nn.Parameter(torch.zeros(num_blocks, channels))

    def first_state(self, embedding: Tensor) -> TimeState:
        """The state for the first block, from the sinusoidal embedding of the time (B, N)."""
        return 0, embedding

    def forward(
        self, features: Tensor, state: TimeState, num_unpooled_tokens: int = 0, num_prefix_tokens: int = 0
    ) -> tuple[Tensor, TimeState]:
        """As in DIALSTM, but the first state comes from `first_state`."""
        calls, embedding = state
        check_calls(calls + 1, len(self.bias))
        state = calls + 1, embedding
        return recalibrate(features, self.attention_map(state)), state

    def attention_map(self, state: TimeState) -> Tensor:
        """The scales of the call that returned this state, (B, N)."""
        calls, embedding = state
        with torch.autocast(embedding.device.type, enabled=False):
            hidden = F.silu(self.hidden(embedding.to(self.hidden.weight.dtype)))  # (B, N/r)
            return 1 + F.linear(hidden, self.weight[calls - 1], self.bias[calls - 1])
