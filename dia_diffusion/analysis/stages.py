"""A network as the analyses see it: stages of blocks in the order of execution, and the maps of their units.

A stage is a run of blocks with the same channel count that share a unit (arXiv 2210.16101, eq. 2). A UViT is one stage.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from dia_diffusion.attention.insertion_points import BRANCH_END, Position, group_by_channels, insertion_points
from dia_diffusion.attention.layers import is_map
from dia_diffusion.errors import InputError
from dia_diffusion.models.attach import attachment_in
from dia_diffusion.models.uvit import UViT
from dia_diffusion.models.uvit_blocks import Block


@dataclass(frozen=True)
class Stage:
    """Blocks with one channel count."""

    channels: int
    """N, of the attention map."""
    blocks: tuple[str, ...]
    """The blocks' names, in order of execution."""
    name: str = ""
    """Empty if the network has only one stage."""
    outputs: tuple[nn.Module, ...] = ()
    """For each block, the module whose output (or the output's first item) is passed to the next block."""
    unit: nn.Module | None = None
    """The unit that recalibrates the blocks' features."""
    attended: tuple[int, ...] = ()
    """The indices of the blocks that carry the unit."""

    @property
    def attended_blocks(self) -> tuple[str, ...]:
        """The names of the blocks that carry the unit."""
        return tuple(self.blocks[index] for index in self.attended)


def stages_of(model: nn.Module) -> list[Stage]:
    """The network's stages in the order in which it runs them.

    Raises:
        InputError: the network is neither a UViT nor one that attach() knows.
    """
    if isinstance(model, UViT):
        names = [*(f"in {i + 1}" for i in range(len(model.in_blocks))), "mid"]
        names += [f"out {i + 1}" for i in range(len(model.out_blocks))]
        blocks = tuple(uvit_blocks(model))
        return [Stage(model.hidden_size, tuple(names), "", blocks, model.unit, tuple(model.attention_blocks))]
    attachment = attachment_in(model)
    network = model if attachment is None else attachment.model
    units = [] if attachment is None else [(stage.unit, stage.positions) for stage in attachment.stages]
    try:
        runs = group_by_channels(insertion_points(network))
    except InputError:
        if attachment is None:
            kind = type(model).__name__
            raise InputError(f"the network must be one whose blocks attach() knows, got a {kind}") from None
        runs = []
    carried = [[unit for unit in units if {p.module for p in unit[1]} & {p.module for p in run}] for run in runs]
    # Units inserted at other positions than attach() chooses form their own stages.
    if sum(map(len, carried)) != len(units) or any(len(each) > 1 for each in carried):
        return _stages(network, [(positions, unit, positions) for unit, positions in units])
    return _stages(
        network, [(run, *(each[0] if each else (None, ()))) for run, each in zip(runs, carried, strict=True)]
    )


def attended_stages(model: nn.Module) -> list[Stage]:
    """The stages that have a unit.

    Raises:
        InputError: no stage has a unit.
    """
    stages = [stage for stage in stages_of(model) if stage.unit is not None and stage.attended]
    if not stages:
        raise InputError("the model has no attention unit, and so no attention maps")
    return stages


def uvit_blocks(model: UViT) -> list[Block]:
    """A UViT's blocks in the order in which it runs them."""
    return cast(list[Block], [*model.in_blocks, model.mid_block, *model.out_blocks])


def _stages(
    model: nn.Module, rows: Sequence[tuple[tuple[Position, ...], nn.Module | None, tuple[Position, ...]]]
) -> list[Stage]:
    """Stages from (positions, unit, positions that carry the unit).

    The blocks of "stage 1" are "1.1", "1.2", ...; those of a single stage are "1", "2", ...
    """
    stages = []
    for number, (positions, unit, carrying) in enumerate(rows, start=1):
        prefix, name = (f"{number}.", f"stage {number}") if len(rows) > 1 else ("", "")
        modules = [position.module for position in positions]
        stages.append(
            Stage(
                positions[0].channels or 0,
                tuple(f"{prefix}{index + 1}" for index in range(len(modules))),
                name,
                tuple(_block_around(model, module) for module in modules),
                unit,
                tuple(modules.index(position.module) for position in carrying),
            )
        )
    return stages


def _block_around(model: nn.Module, name: str) -> nn.Module:
    """The block that contains a position: a module with BRANCH_END, else an item of a ModuleList or Sequential."""
    parts = name.split(".")
    around = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]  # itself, its parent, ...
    modules = {each: model.get_submodule(each) for each in ["", *around]}
    for each in around:
        if hasattr(modules[each], BRANCH_END):
            return modules[each]
    for each in around:
        if isinstance(modules[each.rpartition(".")[0]], nn.ModuleList | nn.Sequential):
            return modules[each]
    return modules[name]


@torch.no_grad()
def maps_during(stages: Sequence[Stage], run: Callable[[], Any]) -> list[Tensor]:
    """h (L, B, N), float32, of each stage's L blocks with a unit, from the one forward pass that `run` makes.

    h is the map by which the unit multiplies features; a spatial unit's map is averaged over positions.
    """
    collected: list[list[Tensor]] = [[] for _ in stages]
    with ExitStack() as hooks:
        for stage, maps in zip(stages, collected, strict=True):
            assert stage.unit is not None
            hooks.callback(stage.unit.register_forward_hook(partial(_keep_map, maps)).remove)
        run()
    return [torch.stack(maps) for maps in collected]


def _keep_map(maps: list[Tensor], unit: Any, given: tuple[Any, ...], returned: tuple[Tensor, Any]) -> None:
    features = given[0]
    h = unit.attention_map(returned[1]).to(features.device, torch.float32)
    if h.dim() == 4:
        h = h.mean((2, 3))
    maps.append(h.expand(len(features), features.shape[1 if is_map(features) else 2]))
