"""Attention units by name, and the unit that holds a self-attention module for every block (arXiv 2210.16101, III-A).

Eq. 1 of the paper is sharing "individual", eq. 2 is "shared". A network holds its unit in a single nn.Module, so that
twin networks differ only in the unit.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from dia_diffusion.attention.controls import BlockScale, BlockTimeScale, FixedScale
from dia_diffusion.attention.dia_lstm import DIALSTM
from dia_diffusion.attention.layers import CastBatchNorm2d, batch_norm, check_calls, recalibrate
from dia_diffusion.attention.sams import (
    ConvolutionalBlockAttention,
    EfficientChannelAttention,
    MixPoolingAttention,
    SelfAttentionModule,
    SpatialGroupEnhance,
    SpatialPyramidAttention,
    SqueezeExcitation,
    StyleRecalibration,
    SwitchableAttention,
)
from dia_diffusion.errors import InputError
from dia_diffusion.registry import Registry

SHARINGS = ("shared", "individual")

UnitState = tuple[Any, ...]  # (number of calls so far, *maps of the last one)


class SelfAttentionUnit(nn.Module):
    """The self-attention modules of all blocks.

    Args:
        channels: N, the channels of the features.
        module: the class of the modules, called with channels and options.
        num_blocks: calls per forward pass; required if each block has its own parameters or BatchNorm.
        sharing: "shared" is one set of parameters for all blocks, "individual" one set per block.
        share_norm: also share the BatchNorm, for a module that has one. Its statistics then mix all blocks, which makes
            training collapse in the paper (VI-B2, Fig. 15).
        options: the module's own arguments.

    Raises:
        InputError: an unknown sharing, a missing num_blocks, share_norm with individual sharing or without a BatchNorm,
            or arguments that the module refuses.
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
            raise InputError(f"`sharing` must be one of {', '.join(SHARINGS)}, got {sharing!r}")
        if not isinstance(share_norm, bool):
            raise InputError(f"`share_norm` must be true or false, got {share_norm!r}")
        individual = sharing == "individual"
        first = module(channels, **options)
        if share_norm and (individual or first.norm_channels is None):
            why = "with individual sharing" if individual else "for a unit without BatchNorm"
            raise InputError(f"`share_norm` must be false {why}, got true")
        per_block = individual or (first.norm_channels is not None and not share_norm)
        if per_block and (num_blocks is None or num_blocks < 1):
            raise InputError(f"`num_blocks` must be 1 or more for a unit with parts per block, got {num_blocks}")

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
        self, features: Tensor, state: UnitState | None = None, num_unpooled_tokens: int = 0, num_prefix_tokens: int = 0
    ) -> tuple[Tensor, UnitState]:
        """Recalibrates one block's features.

        Args:
            features: a_t, tokens (B, L, N) or maps (B, N, H, W).
            state: what the previous block's call returned; None at the first block.
            num_unpooled_tokens: leading tokens (time, class) left out of statistics over tokens; channel maps scale
                them too.
            num_prefix_tokens: leading tokens (time, class) that are not patches: spatial maps neither see nor scale
                them.

        Returns:
            (features times the maps, in the shape and dtype of features; the state for the next block).

        Raises:
            InputError: more calls than num_blocks, or patches that don't form a square grid if the module needs one.
        """
        calls = 0 if state is None else state[0]
        if self.num_blocks is not None:
            check_calls(calls + 1, self.num_blocks)
        sam = self.sams[calls if len(self.sams) > 1 else 0]
        norm = None
        if len(self.norms) > 0:
            # A partial, since an offload hook on the SAM would move a module passed to it to another device.
            norm = partial(batch_norm, self.norms[calls if len(self.norms) > 1 else 0])
        with torch.autocast(features.device.type, enabled=False):
            maps = sam(features, norm, num_unpooled_tokens, num_prefix_tokens)
            for attention_map in maps:
                features = recalibrate(features, attention_map, num_prefix_tokens)
        return features, (calls + 1, *maps)

    def attention_map(self, state: UnitState) -> Tensor:
        """The map of the call that returned this state, float32.

        (B, N) for channel modules; with spatial maps it broadcasts to (B, N, H, W), without prefix tokens.
        """
        maps = state[1:]
        if all(attention_map.dim() == 2 for attention_map in maps):
            return reduce(torch.mul, maps)
        return reduce(torch.mul, (self._spatial(attention_map) for attention_map in maps))

    def _spatial(self, attention_map: Tensor) -> Tensor:
        """Any map as (B, N or 1, H or 1, W or 1)."""
        if attention_map.dim() == 2:
            return attention_map[..., None, None]
        groups = attention_map.shape[1]
        return attention_map if groups == 1 else attention_map.repeat_interleave(self.channels // groups, dim=1)


@dataclass(frozen=True)
class Unit:
    """A row of UNITS.

    `make(channels, **arguments, **options)` returns the unit, an nn.Module that is called once in each block, in the
    order in which the blocks run, as

        features, state = unit(features, state, num_unpooled_tokens, num_prefix_tokens)

    with the state that the previous block's call returned, None in the first block; `SelfAttentionUnit.forward`
    describes the arguments. `unit.attention_map(state)` is the map that multiplied the features in the call that
    returned `state`; it broadcasts to (B, N) or (B, N, H, W).
    """

    make: Callable[..., nn.Module]
    """The unit's class. If it takes `num_blocks`, that is the number of calls per forward pass."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that the name implies."""
    needs_time: bool = False
    """Its first state is `unit.first_state(embedding)` of the time embedding (B, N), which only a UViT provides."""
    can_be_individual: bool = False
    """Whether it accepts sharing="individual", one set of parameters per block."""


def sam_unit(module: type[SelfAttentionModule]) -> Unit:
    """The row of a self-attention module, which SelfAttentionUnit puts into every block."""
    return Unit(SelfAttentionUnit, {"module": module}, can_be_individual=True)


UNITS: Registry[Unit] = Registry("attention unit")

# With these arguments h starts at exactly 1/4, so a DIA-LSTM is the identity until its first update.
IDENTITY = {"activation": "sigmoid", "scale": 4.0, "initialization": "zero"}

UNITS.register("dia-lstm", Unit(DIALSTM, {"cell": "dia-lstm"}))
UNITS.register("dia-lstm-light", Unit(DIALSTM, {"cell": "dia-lstm-light"}))
UNITS.register("dia-lstm-identity", Unit(DIALSTM, {"cell": "dia-lstm", **IDENTITY}))
UNITS.register("dia-lstm-light-identity", Unit(DIALSTM, {"cell": "dia-lstm-light", **IDENTITY}))
UNITS.register("lstm", Unit(DIALSTM, {"cell": "lstm"}))
UNITS.register("se", sam_unit(SqueezeExcitation))
UNITS.register("eca", sam_unit(EfficientChannelAttention))
UNITS.register("cbam", sam_unit(ConvolutionalBlockAttention))
UNITS.register("srm", sam_unit(StyleRecalibration))
UNITS.register("spa", sam_unit(SpatialPyramidAttention))
UNITS.register("sem", sam_unit(SwitchableAttention))
UNITS.register("spem", sam_unit(MixPoolingAttention))
UNITS.register("sge", sam_unit(SpatialGroupEnhance))
UNITS.register("fixed-scale", Unit(FixedScale))
UNITS.register("block-scale", Unit(BlockScale, {"by_channel": False}))
UNITS.register("block-channels", Unit(BlockScale, {"by_channel": True}))
UNITS.register("block-channels-time", Unit(BlockTimeScale, needs_time=True))


def build_attention(
    name: str | None, channels: int, *, num_blocks: int | None = None, **kwargs: Any
) -> nn.Module | None:
    """A unit of UNITS for features of N = `channels`; None for the name None or "none".

    Args:
        name: the unit's name.
        channels: N.
        num_blocks: the unit's calls per forward pass; only units with parameters per block need it.
        kwargs: further arguments of the unit, such as reduction=16.

    Raises:
        InputError: no unit has that name, or it doesn't take one of the arguments.
    """
    if name is None or name == "none":
        if kwargs:
            raise InputError(f"an attention unit must be named for the arguments {', '.join(kwargs)}, got {name!r}")
        return None
    if name not in UNITS:
        raise InputError(f"attention unit must be none or one of {', '.join(UNITS)}, got {name!r}")
    row = UNITS[name]
    arguments = dict(row.arguments)
    if fixed := arguments.keys() & kwargs.keys():
        raise InputError(f"`{min(fixed)}` is set by attention unit {name!r}; leave it out or choose another unit")
    if (parameter := inspect.signature(row.make).parameters.get("num_blocks")) is not None:
        if num_blocks is None and parameter.default is inspect.Parameter.empty:
            raise InputError(f"`num_blocks` must be given for attention unit {name!r}, got None")
        arguments["num_blocks"] = num_blocks
    try:
        return row.make(channels, **arguments, **kwargs)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"attention unit {name!r} can't be built: {error}") from None


@contextmanager
def forked_rng() -> Iterator[None]:
    """Draws inside use a separate generator; the outer one advances by one number, whatever is drawn inside."""
    seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
