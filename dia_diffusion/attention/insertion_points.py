"""Insertion points: where attention units go in a network, in the order of execution (arXiv 2210.16101, Fig. 4, 7)."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
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
# A residual block of any other class may have this attribute: the name of the submodule that ends its branch.
BRANCH_END = "branch_end"
# Attributes of a layer that hold its input channels and its output channels.
CHANNELS = {
    "input": ("in_channels", "in_features", "num_features", "num_channels"),
    "output": ("out_channels", "out_features", "num_features", "num_channels"),
}


@dataclass(frozen=True)
class Position:
    """An insertion point."""

    module: str
    """The module's name in model.named_modules()."""
    side: str = "output"
    """Whether the unit recalibrates the module's "output" or its first "input"."""
    channels: int | None = None
    """N; None reads it from the module."""
    num_prefix_tokens: int = 0
    """Leading tokens (class, time) that are not patches."""


InsertionPoints = Sequence[str | Position] | Callable[[str, nn.Module], bool]


class InsertionHook(ABC):
    """A hook that gets the features at an insertion point whenever its module runs."""

    def __init__(self, position: Position):
        self.position = position

    @abstractmethod
    def take(self, features: Any) -> Any:
        """Returns the features that replace these."""

    def hook(self, model: nn.Module) -> RemovableHandle:
        """Registers the hook in a model, until the handle's remove()."""
        module = model.get_submodule(self.position.module)
        if self.position.side == "input":
            return module.register_forward_pre_hook(self._on_input)
        return module.register_forward_hook(self._on_output)

    def _on_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args:
            raise InputError(
                f"{self.position.module} must be called with its features as the first positional argument for a unit "
                "at its input, got none; put the unit at an output"
            )
        return (self.take(args[0]), *args[1:])

    def _on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.take(output)


def group_by_channels(positions: Sequence[Position]) -> list[tuple[Position, ...]]:
    """Splits positions in order of execution into stages, the longest runs with the same channel count."""
    return [tuple(run) for _, run in groupby(positions, key=lambda position: position.channels)]


def insertion_points(model: nn.Module, at: InsertionPoints | None = None) -> list[Position]:
    """The insertion points of a model, with their channels, in the order of execution.

    Args:
        model: a network, or a module that contains one.
        at: names of modules or Positions, in order of execution, or a predicate of (name, module); None: those of
            known blocks: diffusers' UNet2DModel (after each resnet block) and DiT (between norm and feed-forward),
            torchvision's ResNets (end of the residual branch) and ViTs (between norm and MLP), and blocks with a
            `branch_end`.

    Raises:
        InputError: no insertion point, an unknown name, one given twice, or unknown channels.
    """
    modules = dict(model.named_modules())
    if at is None:
        positions = list(_known(model))
        if not positions:
            raise InputError(
                f"`at` must name the insertion points in a {type(model).__name__}, which has no known block, got None"
            )
    elif callable(at):
        positions = [Position(name) for name, module in modules.items() if name and at(name, module)]
        if not positions:
            raise InputError(
                f"`at` must choose one of the {len(modules) - 1} modules of {type(model).__name__}, got none"
            )
    elif isinstance(at, str) or not isinstance(at, Sequence):
        raise InputError(f"`at` must be a list of module names, or a function of (name, module), got {at!r}")
    else:
        positions = [Position(point) if isinstance(point, str) else point for point in at]
        if not positions:
            raise InputError("`at` must hold names of modules, got an empty list")
    for position in positions:
        _check(position, modules)
    if twice := next((p for i, p in enumerate(positions) if any(p.module == q.module for q in positions[:i])), None):
        raise InputError(f"`at` must name each module once, got {twice.module!r} twice")
    return [_with_channels(position, modules[position.module]) for position in positions]


def _known(model: nn.Module) -> Iterator[Position]:
    for name, module in model.named_modules():
        inside = next((inside for kind, inside in KNOWN_BLOCKS.items() if isinstance(module, kind)), _at_branch_end)
        for position in inside(module):
            yield replace(position, module=f"{name}.{position.module}" if name else position.module)


def _at_branch_end(module: nn.Module) -> list[Position]:
    name = getattr(module, BRANCH_END, None)
    return [Position(name)] if isinstance(name, str) else []


def _in_unet(model: UNet2DModel) -> Iterator[Position]:
    """After each resnet block; the middle block runs before the up blocks, which are registered before it."""
    down = [f"down_blocks.{index}" for index in range(len(model.down_blocks))]
    middle = [] if model.mid_block is None else ["mid_block"]
    up = [f"up_blocks.{index}" for index in range(len(model.up_blocks))]
    for block in [*down, *middle, *up]:
        resnets = getattr(model.get_submodule(block), "resnets", [])
        for index, resnet in enumerate(resnets):
            yield Position(f"{block}.resnets.{index}", channels=resnet.out_channels)


def _in_dit(model: DiTTransformer2DModel) -> Iterator[Position]:
    for index in range(len(model.transformer_blocks)):
        yield Position(f"transformer_blocks.{index}.ff", "input", model.inner_dim)


# A class of networks or blocks -> its insertion points, named relative to the module, in the order of execution.
KNOWN_BLOCKS: dict[type[nn.Module], Callable[[Any], Iterable[Position]]] = {
    UNet2DModel: _in_unet,
    DiTTransformer2DModel: _in_dit,
    EncoderBlock: lambda block: [Position("mlp", "input", block.ln_2.normalized_shape[0], num_prefix_tokens=1)],
    BasicBlock: lambda block: [Position("bn2")],
    Bottleneck: lambda block: [Position("bn3")],
}


def _check(position: Position, modules: dict[str, nn.Module]) -> None:
    if not isinstance(position, Position):
        raise InputError(f"`at` must hold names of modules, or Positions, got {position!r}")
    if position.side not in SIDES:
        raise InputError(f"`side` must be one of {', '.join(SIDES)}, got {position.side!r} for {position.module!r}")
    if not isinstance(position.module, str) or position.module not in modules or not position.module:
        nearest = difflib.get_close_matches(str(position.module), [name for name in modules if name], n=3, cutoff=0.0)
        raise InputError(
            f"`at` must name modules of the model, got {position.module!r}; the nearest are {', '.join(nearest)}"
        )


def _with_channels(position: Position, module: nn.Module) -> Position:
    channels = position.channels
    if channels is None:
        channels = _channels(module, position.side)
    if not isinstance(channels, int) or channels < 1:
        raise InputError(
            f"`channels` must be given for the {position.side} of {position.module!r}, a {type(module).__name__}: pass "
            f"Position({position.module!r}, {position.side!r}, channels=...)"
        )
    return replace(position, channels=channels)


def _channels(module: nn.Module, side: str) -> int | None:
    if isinstance(module, nn.Sequential) and len(module) > 0:
        return _channels(module[0 if side == "input" else -1], side)
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    return next((value for name in CHANNELS[side] if isinstance(value := getattr(module, name, None), int)), None)
