"""Controls for the shared unit: scales in its place that see no features, to tell what of its effect is attention.

DIA-LSTM's attention map starts near 0.25 in every channel of every block (both gates at zero: sigmoid(0) * sigmoid(0)).
These start there too, and keep it, or learn a number a block, or learn a vector of channels a block.
"""

import torch
from torch import Tensor, nn

from dia_diffusion.attention.recalibration import finite, recalibrate
from dia_diffusion.errors import InputError


class FixedScale(nn.Module):
    """Every channel of every block times one number that nothing trains.

    Args:
        channels: N; not used, as every unit is built from it.
        scale: the number.

    Raises:
        InputError: scale is not a finite number.
    """

    def __init__(self, channels: int, scale: float = 0.25):
        super().__init__()
        self.scale = finite("scale", scale)

    def forward(
        self, features: Tensor, state: None = None, num_unpooled_tokens: int = 0, num_extra_tokens: int = 0
    ) -> tuple[Tensor, None]:
        """As DIALSTM's; there is no state."""
        return features * self.scale, None

    def attention_map(self, state: None) -> Tensor:
        """What each call multiplies with, ()."""
        return torch.tensor(self.scale)


class BlockScale(nn.Module):
    """Each block times its own learned number or channel vector, the same for every image and time.

    AdamW decays these parameters as it does all others, so what the loss doesn't hold drifts to 0, not to `start`.

    Args:
        channels: N, the channels of the features.
        num_blocks: the calls of one forward pass of the model.
        by_channel: a vector of N a block instead of a number.
        start: what every parameter starts at.

    Raises:
        InputError: start is not a finite number.
    """

    def __init__(self, channels: int, num_blocks: int, by_channel: bool = False, start: float = 0.25):
        super().__init__()
        shape = (num_blocks, channels if by_channel else 1)
        self.scale = nn.Parameter(torch.full(shape, finite("start", start)))

    def forward(
        self, features: Tensor, state: int | None = None, num_unpooled_tokens: int = 0, num_extra_tokens: int = 0
    ) -> tuple[Tensor, int]:
        """As DIALSTM's; the state is the number of calls so far."""
        state = (state or 0) + 1
        if state > len(self.scale):
            raise InputError(f"the unit was built for {len(self.scale)} blocks and is called in block {state}")
        return recalibrate(features, self.attention_map(state)), state

    def attention_map(self, state: int) -> Tensor:
        """What the call that returned this state multiplied with, (N,) or (1,)."""
        return self.scale[state - 1]
