"""What a self-attention module (SAM) consists of (arXiv 2210.16101, Fig. 1 and 4, Table II)."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

Norm = Callable[[Tensor], Tensor]  # (B, N, H, W) to the same shape


class SelfAttentionModule(nn.Module, ABC):
    """One block's module: extraction and processing. Recalibration, the third part, is the same for all of them.

    Subclasses are built as `Subclass(channels, **options)`.
    """

    norm_channels: int | None = None
    """Channels of the BatchNorm between processing and map, None where there is none. It is held by the unit, since
    its statistics belong to a block even where all else is shared (VI-B2)."""

    @abstractmethod
    def forward(
        self, features: Tensor, norm: Norm | None, num_unpooled_tokens: int, num_extra_tokens: int
    ) -> tuple[Tensor, ...]:
        """The maps whose product scales the features; see SelfAttentionUnit.forward for the arguments."""


class OneMapModule(SelfAttentionModule):
    """A module whose two parts follow each other and give one map."""

    @abstractmethod
    def extract(self, features: Tensor, num_unpooled_tokens: int, num_extra_tokens: int) -> Tensor:
        """What is read of tokens (B, L, N) or maps (B, N, H, W), in float32 or more."""

    @abstractmethod
    def process(self, extracted: Tensor, norm: Norm | None) -> Tensor:
        """The attention map: (B, N), or of G channels that divide N, (B, G, H, W)."""

    def forward(
        self, features: Tensor, norm: Norm | None, num_unpooled_tokens: int, num_extra_tokens: int
    ) -> tuple[Tensor, ...]:
        return (self.process(self.extract(features, num_unpooled_tokens, num_extra_tokens), norm),)
