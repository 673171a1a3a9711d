"""The paper's attention units and their controls, and the one place where a name becomes one."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dia_diffusion.attention.controls import BlockScale, BlockTimeScale, FixedScale
from dia_diffusion.attention.dia_lstm import DIALSTM
from dia_diffusion.attention.sams import (
    ConvolutionalBlockAttention,
    EfficientChannelAttention,
    MixPoolingAttention,
    SpatialGroupEnhance,
    SpatialPyramidAttention,
    SqueezeExcitation,
    StyleRecalibration,
    SwitchableAttention,
)
from dia_diffusion.attention.unit import SelfAttentionUnit
from dia_diffusion.errors import InputError

# DIA-LSTM's h starts at exactly 1/4, so the unit is the identity until its first update.
IDENTITY = {"activation": "sigmoid", "scale": 4.0, "initialization": "zero"}

# name -> the unit's class and the arguments the name stands for
UNITS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "dia-lstm": (DIALSTM, {"cell": "dia-lstm"}),
    "dia-lstm-light": (DIALSTM, {"cell": "dia-lstm-light"}),
    "dia-lstm-identity": (DIALSTM, {"cell": "dia-lstm", **IDENTITY}),
    "dia-lstm-light-identity": (DIALSTM, {"cell": "dia-lstm-light", **IDENTITY}),
    "lstm": (DIALSTM, {"cell": "lstm"}),
    "se": (SelfAttentionUnit, {"module": SqueezeExcitation}),
    "eca": (SelfAttentionUnit, {"module": EfficientChannelAttention}),
    "cbam": (SelfAttentionUnit, {"module": ConvolutionalBlockAttention}),
    "srm": (SelfAttentionUnit, {"module": StyleRecalibration}),
    "spa": (SelfAttentionUnit, {"module": SpatialPyramidAttention}),
    "sem": (SelfAttentionUnit, {"module": SwitchableAttention}),
    "spem": (SelfAttentionUnit, {"module": MixPoolingAttention}),
    "sge": (SelfAttentionUnit, {"module": SpatialGroupEnhance}),
    "fixed-scale": (FixedScale, {}),
    "block-scale": (BlockScale, {"by_channel": False}),
    "block-channels": (BlockScale, {"by_channel": True}),
    "block-channels-time": (BlockTimeScale, {}),
}


def build_attention(
    name: str | None, channels: int, *, num_blocks: int | None = None, **kwargs: Any
) -> nn.Module | None:
    """The attention unit of that name for so many channels; None or "none" is no unit.

    A unit is called as `features, state = unit(features, state, num_unpooled_tokens, num_extra_tokens)`, once a block,
    in the order of the blocks, with None as the first state; that of "block-channels-time" is
    `unit.first_state(embedding)`, which only a UViT gives it. `unit.attention_map(state)` is what the call that
    returned `state` multiplied the features with.

    num_blocks: the calls of one forward pass; only units with parts for each block need it.

    Raises:
        InputError: no unit has that name, or it does not take one of the arguments.
    """
    if name is None or name == "none":
        if kwargs:
            raise InputError(f"no attention unit is named, so it can't take {', '.join(kwargs)}")
        return None
    if name not in UNITS:
        raise InputError(f"unknown attention unit {name!r}; accepted: none, {', '.join(UNITS)}")
    unit, named = UNITS[name]
    if overridden := named.keys() & kwargs.keys():
        raise InputError(f"attention unit {name!r} decides its {min(overridden)} itself; choose another unit")
    if of_blocks := inspect.signature(unit).parameters.get("num_blocks"):
        if num_blocks is None and of_blocks.default is inspect.Parameter.empty:
            raise InputError(f"attention unit {name!r} has parameters for each block; build it with num_blocks")
        named = {**named, "num_blocks": num_blocks}
    try:
        return unit(channels, **named, **kwargs)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"attention unit {name!r} can't be built: {error}") from None


@contextmanager
def own_generator() -> Iterator[None]:
    """While it lasts, torch draws from another generator; afterwards as if one number had been drawn."""
    seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


__all__ = ["DIALSTM", "UNITS", "build_attention", "own_generator"]
