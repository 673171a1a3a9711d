"""Inserts attention units into any network by hooks (arXiv 2210.16101, eq. 2 and 4).

There is one unit per stage: a maximal run of insertion points, in execution order, with the same channel count. Its
state runs along depth in a forward pass. Gradient checkpointing (torch.utils.checkpoint, use_reentrant=False) reruns
parts of the forward pass in the backward pass, without the parts before them; each insertion point then gets the state
that it had the first time.
"""

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dia_diffusion.attention.insertion_points import (
    InsertionHook,
    InsertionPoints,
    Position,
    group_by_channels,
    insertion_points,
)
from dia_diffusion.attention.units import UNITS, build_attention, forked_rng
from dia_diffusion.errors import InputError
from dia_diffusion.models.registry import wrapped_networks

UNITS_NAME = "attention_units"
SAVE = "save_pretrained"
SET_BY_ATTACH = {"name", "channels", "num_blocks"}  # arguments of build_attention
NODE_KEY = "dia_diffusion.attach"


class Pass:
    """One forward pass; `checkpointing` is whether the model has gradient checkpointing enabled."""

    def __init__(self, checkpointing: bool):
        self.position = 0  # index of the insertion point that runs next
        self.state: Any = None  # what the unit returned last
        self.grad_enabled = torch.is_grad_enabled()
        self.incoming: dict[int, Any] = {}
        # Nodes of the autograd graph are numbered as they are created, so a node's pass can be found by its number.
        # Reading the number would cause a graph break in a compiled model, and a compiled graph recomputes nothing.
        self.numbered = checkpointing or not torch.compiler.is_compiling()
        self.first_node = self.last_node = next_node() if self.numbered else 0

    def end(self) -> None:
        """Marks the end of the pass; from now on its positions only run for recomputation."""
        self.state = None
        if self.numbered:
            self.last_node = next_node()

    def keep(self, incoming: Any) -> None:
        """Stores the state that the next position gets, for its recomputation.

        Raises InputError: a checkpoint in a compiled model that didn't declare gradient checkpointing.
        """
        if not self.numbered:
            raise InputError(
                "gradient checkpointing in a compiled model with attached units must be enabled by its "
                "enable_gradient_checkpointing(), got a checkpoint of another kind"
            )

        def leaf(value: Any) -> Any:
            # A leaf, so that no graph is held. It requires a gradient if the original did, since that decides which
            # tensors are saved for the backward pass, and recomputation must save the same ones.
            return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

        self.incoming[self.position] = tree_map(leaf, incoming)


class Passes:
    """The passes that may be recomputed. Each lives as long as the autograd graph that holds it."""

    def __init__(self) -> None:
        self.kept: weakref.WeakSet[Pass] = weakref.WeakSet()

    def __reduce__(self) -> Any:
        return Passes, ()  # a copied model has no graph yet

    def hold(self, current: Pass, output: Any) -> None:
        """Ties the lifetime of the pass to the autograd graph of these tensors, if it kept states."""
        if torch.compiler.is_compiling() or not current.incoming:
            return
        self.kept.add(current)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                metadata: Any = tensor.grad_fn.metadata  # a dict, whatever the stubs say
                metadata[NODE_KEY, id(self)] = current

    def incoming_again(self, position: int, name: str) -> Any:
        """The state that a position had in its forward pass, when it is recomputed in the backward pass.

        Raises InputError: no single forward pass fits.
        """
        node = torch._C._current_autograd_node()
        if node is None:
            raise InputError(
                f"{name} has an attached unit and must be called in the forward pass of its whole model, got a call "
                "outside it"
            )
        number = node._sequence_nr()
        matches = [
            kept for kept in self.kept if kept.first_node <= number < kept.last_node and position in kept.incoming
        ]
        if len(matches) != 1:
            raise InputError(
                f"{name} has an attached unit and must be recomputed with use_reentrant=False, in one thread, got a "
                f"backward pass that belongs to {len(matches)} forward passes"
            )
        return matches[0].incoming[position]


@torch.compiler.disable
def next_node() -> int:
    """The number of the next node of the autograd graph that this thread makes."""
    return torch._C._autograd._get_sequence_nr()


def in_checkpoint() -> bool:
    """Whether the running code may be recomputed in the backward pass."""
    if torch.compiler.is_compiling():  # compilation makes both one graph
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


@dataclass(frozen=True)
class Stage:
    """Insertion points that share a unit."""

    channels: int
    positions: tuple[Position, ...]
    unit: nn.Module


class AttentionUnits(nn.Module):
    """The units of an attached model, one per stage, its `attention_units`.

    Not an nn.ModuleList: diffusers' group offloading assumes that each module of one runs once, in order.
    """

    attachment: "Attachment"

    def __init__(self, units: Iterable[nn.Module]):
        super().__init__()
        for index, unit in enumerate(units):
            self.add_module(str(index), unit)

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int) -> nn.Module:
        return list(self)[index]

    def __iter__(self) -> Iterator[nn.Module]:
        return self.children()

    def forward(self, output: Any) -> Any:
        """Identity: if the model is a Sequential, it calls this as its last module."""
        return output


def attach(
    model: nn.Module, unit: str = "dia-lstm", at: InsertionPoints | None = None, **unit_kwargs: Any
) -> "Attachment":
    """Inserts attention units into a model: one per stage, shared by the stage's insertion points.

    The units become part of the model (`model.attention_units`), so attach before you create optimizers, DDP and
    torch.compile. Their initial weights come from a forked generator, so the model's other weights and later draws
    don't depend on the unit.

    Args:
        model: a UNet2DModel or DiTTransformer2DModel of diffusers, a ResNet or ViT of torchvision, a model that holds
            one, or any other with `at`. Every forward pass must run each position once, in the order given.
        unit: its name; see build_attention.
        at: names of modules whose outputs the unit recalibrates; Positions; or a predicate of (name, module). None
            means after each resnet block of a UNet, at the end of a ResNet's residual branches, or between norm and
            MLP of a transformer.
        unit_kwargs: further arguments of the unit, such as reduction=16.

    Returns:
        The attachment; its detach() removes the units again.

    Raises:
        InputError: no insertion point, an unknown unit or one that needs the time, or a model that already has units or
            is wrapped by DDP or torch.compile.
    """
    if hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise InputError(f"`model` must be the model before it is wrapped, got a {type(model).__name__}")
    if (attached := attachment_in(model)) is not None:
        raise InputError(
            f"`model` must be without attached units, got a {type(attached.model).__name__} with some; detach() first"
        )
    if hasattr(model, UNITS_NAME):
        raise InputError(
            f"`model` must have no attribute {UNITS_NAME} of its own, got a {type(model).__name__} with one"
        )
    if decided := SET_BY_ATTACH & unit_kwargs.keys():
        raise InputError(f"`{min(decided)}` is set by attach(); leave it out")
    if unit in (None, "none"):
        raise InputError(f"`unit` must be the name of a unit, got {unit!r}")
    if unit in UNITS and UNITS[unit].needs_time:
        raise InputError(f"`unit` must not need the time, which only a UViT gives its unit, got {unit!r}")
    positions = insertion_points(model, at)
    for position in positions:
        if _has_unit(model.get_submodule(position.module)):  # from attach() on an enclosing network
            raise InputError(
                f"`at` must name modules without an attached unit, got {position.module}; detach() its unit first"
            )
    stages = group_by_channels(positions)
    units: list[nn.Module] = []
    with forked_rng():
        for run in stages:
            built = build_attention(unit, run[0].channels or 0, num_blocks=len(run), **unit_kwargs)
            assert built is not None
            units.append(built)
    return Attachment(model, AttentionUnits(units), stages, unit, unit_kwargs)


def attachment_in(model: nn.Module) -> "Attachment | None":
    """The attachment of a model or of one within it."""
    return next((module.attachment for module in model.modules() if isinstance(module, AttentionUnits)), None)


class Attachment:
    """A model's units, the hooks that call them, and the state of the current forward pass.

    model: the attached model.
    stages: in execution order, each with its insertion points and its unit.
    unit_name, unit_kwargs: the arguments of attach().
    """

    def __init__(
        self,
        model: nn.Module,
        units: AttentionUnits,
        stages: list[tuple[Position, ...]],
        unit_name: str,
        unit_kwargs: dict[str, Any],
    ):
        self.model, self.unit_name, self.unit_kwargs = model, unit_name, unit_kwargs
        self.stages = [Stage(run[0].channels or 0, run, unit) for run, unit in zip(stages, units, strict=True)]
        self.calls = [_Call(self, stage, position) for stage in self.stages for position in stage.positions]
        for index, call in enumerate(self.calls):
            call.index = index
        # The modules that diffusers' enable_gradient_checkpointing() switches.
        self.checkpointed = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self.current: Pass | None = None
        self.passes = Passes()

        like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
        units.to(device=None if like is None else like.device, dtype=None if like is None else like.dtype)
        units.train(model.training)
        units.attachment = self
        setattr(model, UNITS_NAME, units)
        if hasattr(model, SAVE):
            setattr(model, SAVE, self._save)  # the model's own method would save tensors that its class can't load
        self.hooks = [
            model.register_forward_pre_hook(self._start),
            model.register_forward_hook(self._finish),
            model.register_forward_hook(self._end, always_call=True),
            *(call.hook(model) for call in self.calls),
        ]

    @property
    def units(self) -> AttentionUnits:
        """The model's `attention_units`."""
        return getattr(self.model, UNITS_NAME)

    @property
    def positions(self) -> list[Position]:
        """All insertion points in execution order."""
        return [call.position for call in self.calls]

    def detach(self) -> None:
        """Restores the model's function, parameters and tensor names. A second call does nothing."""
        if not self.hooks:
            return
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        delattr(self.model, UNITS_NAME)
        self.model.__dict__.pop(SAVE, None)

    def _save(self, *args: Any, **kwargs: Any) -> Any:
        """Saves the model as the class that loads it with its units."""
        rows = wrapped_networks().values()
        row = next((row for row in rows if isinstance(self.model, row.network)), None)
        if row is None:
            raise InputError(
                f"a model with attached units must be a {' or '.join(row.name for row in rows)} to be saved by {SAVE}, "
                f"got a {type(self.model).__name__}, which would be loaded without them; save its state_dict() instead"
            )
        return row.model.from_backbone(self.model).save_pretrained(*args, **kwargs)

    def _start(self, model: nn.Module, args: Any) -> None:
        checkpointing = any(module.gradient_checkpointing for module in self.checkpointed)
        self.current = Pass(checkpointing=bool(checkpointing))

    def _finish(self, model: nn.Module, args: Any, output: Any) -> None:
        current = self.current
        if current is None:  # a nested pass has ended it
            return
        if current.position != len(self.calls):
            skipped = self.calls[current.position].position.module
            raise InputError(f"every forward pass must run each insertion point once, got one that left out {skipped}")
        self.passes.hold(current, output)

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        if self.current is not None:
            self.current.end()
            self.current = None


def _has_unit(module: nn.Module) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(isinstance(getattr(hook, "__self__", None), _Call) for hook in hooks)


class _Call(InsertionHook):
    """The hook of one insertion point, which calls the unit."""

    def __init__(self, attachment: Attachment, stage: Stage, position: Position):
        super().__init__(position)
        self.attachment, self.stage = attachment, stage
        self.index = 0
        self.is_first = position is stage.positions[0]

    def take(self, features: Any) -> Tensor:
        self._check(features)
        attachment = self.attachment
        current = attachment.current
        if current is None:
            state = attachment.passes.incoming_again(self.index, self.position.module)
        else:
            self._check_order(current)
            state = None if self.is_first else current.state
            if in_checkpoint():
                current.keep(state)
        features, state = self.stage.unit(features, state, 0, self.position.num_prefix_tokens)
        if current is not None:
            attachment.passes.hold(current, features)
            current.state = state
            current.position = self.index + 1
        return features

    def _check_order(self, current: Pass) -> None:
        name, calls = self.position.module, self.attachment.calls
        if current.position != self.index:
            expected = "nothing" if current.position == len(calls) else calls[current.position].position.module
            how = "again" if current.position > self.index else "too early"
            raise InputError(
                "every forward pass must run each insertion point once, in the order in which they are named, got "
                f"{name} {how}, where {expected} was next"
            )
        if current.grad_enabled and not torch.is_grad_enabled():
            raise InputError(
                f"{name} must run with gradients in a forward pass with gradients, got none; use gradient "
                "checkpointing with use_reentrant=False"
            )

    def _check(self, features: Any) -> None:
        name, side, channels = self.position.module, self.position.side, self.stage.channels
        if not isinstance(features, Tensor) or features.dim() not in (3, 4):
            what = str(tuple(features.shape)) if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise InputError(f"the {side} of {name} must have shape (B, L, N) or (B, N, H, W) for a unit, got {what}")
        actual = features.shape[1 if features.dim() == 4 else 2]
        if actual != channels:
            raise InputError(f"the {side} of {name} must have {channels} channels, as its unit, got {actual}")
