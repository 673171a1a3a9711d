"""A self-attention module in every block: one for all, or a set of parameters a block (arXiv 2210.16101, III-A).

Eq. 1 of the paper is sharing "individual", eq. 2 "shared". Both are one nn.Module that the model holds once, so that a
network's twins differ in the unit alone.
"""

from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from dia_diffusion.attention.layers import CastBatchNorm2d, batch_norm, recalibrate
from dia_diffusion.attention.sams import SelfAttentionModule
from dia_diffusion.errors import InputError

SHARINGS = ("shared", "individual")

UnitState = tuple[Any, ...]  # the calls so far, an int, and the maps that the last one multiplied features with


class SelfAttentionUnit(nn.Module):
    """All blocks' self-attention modules.

    Args:
        channels: N, the channels of the features.
        module: what makes a block's module, called with channels and options.
        num_blocks: the calls of one forward pass of the model; needed where blocks have parts of their own.
        sharing: "shared" is one set of parameters for all blocks, "individual" one set a block.
        share_norm: one BatchNorm for all blocks too, of a module that has one. Its statistics then mix the blocks',
            with which training collapses in the paper (VI-B2, Fig. 15).
        options: the module's own arguments.

    Raises:
        InputError: an unknown sharing, no num_blocks where it is needed, share_norm of a module that shares nothing
            or has no BatchNorm, or what the module refuses.
    """

    def __init__(
        self,
        channels: int,
        module: type[SelfAttentionModule],
        num_blocks: int | None = None,
        sharing: str = "shared",
        share_norm: bool = False,
        **options: Any,
    ):
        super().__init__()
        if sharing not in SHARINGS:
            raise InputError(f"unknown sharing {sharing!r}; accepted: {', '.join(SHARINGS)}")
        if not isinstance(share_norm, bool):
            raise InputError(f"share_norm is {share_norm!r}; accepted: true or false")
        individual = sharing == "individual"
        first = module(channels, **options)
        if share_norm and (individual or first.norm_channels is None):
            why = "sharing is individual" if individual else "the unit has no BatchNorm"
            raise InputError(f"share_norm is true, but {why}; leave it out")
        per_block = individual or (first.norm_channels is not None and not share_norm)
        if per_block and (num_blocks is None or num_blocks < 1):
            raise InputError(f"num_blocks is {num_blocks}; accepted: 1 or more, as this unit has parts for each block")

        self.channels = channels
        self.num_blocks = num_blocks if per_block else None
        blocks = range(1, num_blocks or 1)
        self.sams = nn.ModuleList([first, *(module(channels, **options) for _ in blocks if individual)])
        self.norms = nn.ModuleList()
        if first.norm_channels is not None:
            self.norms.extend(
                CastBatchNorm2d(first.norm_channels) for _ in range(1 if share_norm else self.num_blocks or 1)
            )

    def forward(
        self, features: Tensor, state: UnitState | None = None, num_unpooled_tokens: int = 0, num_extra_tokens: int = 0
    ) -> tuple[Tensor, UnitState]:
        """Recalibrates one block's features.

        Args:
            features: a_t, tokens (B, L, N) or maps (B, N, H, W).
            state: what the previous block's call returned; None at the first block.
            num_unpooled_tokens: leading tokens (time, class) left out of statistics over tokens; the channel maps made
                of them scale them too.
            num_extra_tokens: leading tokens on no grid: parts that need places leave them out, and maps over places
                leave them as they are.

        Returns:
            (features times the maps, in the shape and dtype of features; the state for the next block).

        Raises:
            InputError: more calls than num_blocks, or tokens on no square grid where the module needs one.
        """
        calls = 0 if state is None else state[0]
        if self.num_blocks is not None and calls >= self.num_blocks:
            raise InputError(f"the unit was built for {self.num_blocks} blocks and is called in block {calls + 1}")
        sam = self.sams[calls if len(self.sams) > 1 else 0]
        norm = None
        if len(self.norms) > 0:
            # Not the module itself, which a hook on the SAM would move to another device.
            norm = partial(batch_norm, self.norms[calls if len(self.norms) > 1 else 0])
        with torch.autocast(features.device.type, enabled=False):
            maps = sam(features, norm, num_unpooled_tokens, num_extra_tokens)
            for attention_map in maps:
                features = recalibrate(features, attention_map, num_extra_tokens)
        return features, (calls + 1, *maps)

    def attention_map(self, state: UnitState) -> Tensor:
        """What the call that returned this state multiplied features with, float32.

        Of channel modules (B, N); of those with maps over places what broadcasts to (B, N, H, W), of tokens their
        grid, on which the extra tokens are not.
        """
        maps = state[1:]
        if all(attention_map.dim() == 2 for attention_map in maps):
            return reduce(torch.mul, maps)
        return reduce(torch.mul, (self._over_places(attention_map) for attention_map in maps))

    def _over_places(self, attention_map: Tensor) -> Tensor:
        """Any map as (B, N or 1, H or 1, W or 1)."""
        if attention_map.dim() == 2:
            return attention_map[..., None, None]
        groups = attention_map.shape[1]
        return attention_map if groups == 1 else attention_map.repeat_interleave(self.channels // groups, dim=1)
