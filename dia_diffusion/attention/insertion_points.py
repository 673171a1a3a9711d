"""Where a network's blocks take an attention unit, in the order in which it runs them (arXiv 2210.16101, Fig. 4, 7)."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import nn
from torch.utils.hooks import RemovableHandle
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vision_transformer import EncoderBlock

from dia_diffusion.errors import InputError

SIDES = ("input", "output")
# A residual block of any class may name its own: `branch_end = "bn2"`, the submodule that ends the residual branch.
BRANCH_END = "branch_end"
# Attributes that tell a layer's channels, of what it is given and of what it returns.
CHANNELS = {
    "input": ("in_channels", "in_features", "num_features", "num_channels"),
    "output": ("out_channels", "out_features", "num_features", "num_channels"),
}


@dataclass(frozen=True)
class Position:
    """A place for the unit."""

    module: str
    """Its name in the model, as model.named_modules() has it."""
    side: str = "output"
    """Whether the unit recalibrates what the module returns, "output", or what it is given first, "input"."""
    channels: int | None = None
    """N; None is what the module tells of itself."""
    num_extra_tokens: int = 0
    """Leading tokens (class, time) on no grid."""


Places = Sequence[str | Position] | Callable[[str, nn.Module], bool]


class PlaceHook(ABC):
    """What is called with the features at a position whenever its module runs."""

    def __init__(self, position: Position):
        self.position = position

    @abstractmethod
    def take(self, features: Any) -> Any:
        """The features that the network goes on with, given those at the position."""

    def hook(self, model: nn.Module) -> RemovableHandle:
        """From now on, until the handle's remove(), in the model whose module the position names."""
        module = model.get_submodule(self.position.module)
        if self.position.side == "input":
            return module.register_forward_pre_hook(self._on_input)
        return module.register_forward_hook(self._on_output)

    def _on_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args:
            raise InputError(
                f"{self.position.module} was called without positional arguments, the first of which its unit "
                "recalibrates; accepted: an output as the unit's place"
            )
        return (self.take(args[0]), *args[1:])

    def _on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.take(output)


def in_stages(positions: Sequence[Position]) -> list[tuple[Position, ...]]:
    """The stages of positions in order of execution: the maximal runs of one channel count."""
    return [tuple(run) for _, run in groupby(positions, key=lambda position: position.channels)]


def positions_of(model: nn.Module, at: Places | None = None) -> list[Position]:
    """The positions in a model, each with its channels, in the order in which the model runs them.

    Args:
        model: a network, or one that holds it.
        at: names of modules or Positions, in order of execution, or a function that is told each module's name and the
            module and says which; None is the places of the blocks that are known: diffusers' UNet2DModel (after each
            resnet block) and DiT (between norm and feed-forward), torchvision's ResNets (end of the residual branch)
            and ViTs (between norm and MLP), and blocks with a `branch_end`.

    Raises:
        InputError: no position, a name that there isn't or that comes twice, or channels that can't be told.
    """
    modules = dict(model.named_modules())
    if at is None:
        found = list(_known(model))
        if not found:
            raise InputError(
                f"{type(model).__name__} has no block whose place for a unit is known; name the places with at=[...]"
            )
    elif callable(at):
        found = [Position(name) for name, module in modules.items() if name and at(name, module)]
        if not found:
            raise InputError(f"at chooses none of the {len(modules) - 1} modules of {type(model).__name__}")
    elif isinstance(at, str):
        raise InputError(f"at is the text {at!r}; accepted: a list of module names, or a function of name and module")
    else:
        found = [Position(place) if isinstance(place, str) else place for place in at]
        if not found:
            raise InputError("at is an empty list; accepted: names of modules")
    for position in found:
        _check(position, modules)
    if twice := next((p for i, p in enumerate(found) if any(p.module == q.module for q in found[:i])), None):
        raise InputError(f"at names {twice.module!r} twice; accepted: each module once")
    return [_with_channels(position, modules[position.module]) for position in found]


def _known(model: nn.Module) -> Iterator[Position]:
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        branch_end = getattr(module, BRANCH_END, None)
        if isinstance(module, UNet2DModel):
            yield from _in_unet(module, prefix)
        elif isinstance(module, DiTTransformer2DModel):
            for index in range(len(module.transformer_blocks)):
                yield Position(f"{prefix}transformer_blocks.{index}.ff", "input", module.inner_dim)
        elif isinstance(module, EncoderBlock):
            yield Position(f"{prefix}mlp", "input", module.ln_2.normalized_shape[0], num_extra_tokens=1)
        elif isinstance(module, BasicBlock):
            yield Position(f"{prefix}bn2")
        elif isinstance(module, Bottleneck):
            yield Position(f"{prefix}bn3")
        elif isinstance(branch_end, str):
            yield Position(f"{prefix}{branch_end}")


def _in_unet(model: UNet2DModel, prefix: str) -> Iterator[Position]:
    """After each resnet block; the middle block runs before the up blocks, which are registered before it."""
    down = [f"down_blocks.{index}" for index in range(len(model.down_blocks))]
    middle = [] if model.mid_block is None else ["mid_block"]
    up = [f"up_blocks.{index}" for index in range(len(model.up_blocks))]
    for block in [*down, *middle, *up]:
        resnets = getattr(model.get_submodule(block), "resnets", [])
        for index, resnet in enumerate(resnets):
            yield Position(f"{prefix}{block}.resnets.{index}", channels=resnet.out_channels)


def _check(position: Position, modules: dict[str, nn.Module]) -> None:
    if not isinstance(position, Position):
        raise InputError(f"at holds {position!r}; accepted: names of modules, or Positions")
    if position.side not in SIDES:
        raise InputError(f"side {position.side!r} of position {position.module!r}; accepted: {', '.join(SIDES)}")
    if not isinstance(position.module, str) or position.module not in modules or not position.module:
        nearest = difflib.get_close_matches(str(position.module), [name for name in modules if name], n=3, cutoff=0.0)
        raise InputError(
            f"at names {position.module!r}, which is no module of the model; nearest: {', '.join(nearest)}"
        )


def _with_channels(position: Position, module: nn.Module) -> Position:
    channels = position.channels
    if channels is None:
        channels = _channels(module, position.side)
    if not isinstance(channels, int) or channels < 1:
        raise InputError(
            f"the channels of the {position.side} of {position.module!r}, a {type(module).__name__}, can't be told; "
            f"pass Position({position.module!r}, {position.side!r}, channels=...)"
        )
    return replace(position, channels=channels)


def _channels(module: nn.Module, side: str) -> int | None:
    if isinstance(module, nn.Sequential) and len(module) > 0:
        return _channels(module[0 if side == "input" else -1], side)
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    return next((value for name in CHANNELS[side] if isinstance(value := getattr(module, name, None), int)), None)
