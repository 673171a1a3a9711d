"""A network as the analyses see it: stages of blocks in the order of execution, and the maps of their units.

A stage is a run of blocks with one channel count, which share a unit (arXiv 2210.16101, eq. 2). A UViT is one stage.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from dia_diffusion.attention.insertion_points import BRANCH_END, Position, group_by_channels, insertion_points
from dia_diffusion.attention.layers import is_map
from dia_diffusion.errors import InputError
from dia_diffusion.models.attach import attachment_in
from dia_diffusion.models.uvit import Block, UViT


@dataclass(frozen=True)
class Stage:
    """Blocks with one channel count."""

    name: str
    """Of a network with several stages; "" where it is one."""
    channels: int
    """N, of the attention map."""
    blocks: tuple[str, ...]
    """The blocks' names, in order of execution."""
    outputs: tuple[nn.Module, ...]
    """The module of each block whose output (or its first item) goes on to the next block."""
    unit: nn.Module | None
    """What recalibrates the features of the blocks."""
    attended: tuple[int, ...]
    """The indices of the blocks that carry the unit."""

    @property
    def attended_blocks(self) -> tuple[str, ...]:
        """The names of the blocks that carry the unit."""
        return tuple(self.blocks[index] for index in self.attended)


def stages_of(model: nn.Module) -> list[Stage]:
    """The network's stages in the order in which it runs them; none of a network that attach() doesn't know."""
    if isinstance(model, UViT):
        return [_uvit_stage(model)]
    attachment = attachment_in(model)
    if attachment is None:
        return [_stage(model, number, run) for number, run in _numbered(_known_runs(model))]
    units = [(stage.positions, stage.unit) for stage in attachment.stages]
    runs = _known_runs(attachment.model)
    carried = [[(p, unit) for p, unit in units if {q.module for q in p} & {q.module for q in run}] for run in runs]
    # Units that were put elsewhere than where attach() puts them make stages of their own.
    if sum(map(len, carried)) != len(units) or any(len(each) > 1 for each in carried):
        runs, carried = [positions for positions, _ in units], [[each] for each in units]
    return [
        _stage(attachment.model, number, run, *(carried[index][0] if carried[index] else ((), None)))
        for index, (number, run) in enumerate(_numbered(runs))
    ]


def attended_stages(model: nn.Module) -> list[Stage]:
    """The stages that have a unit.

    Raises:
        InputError: none has one.
    """
    stages = [stage for stage in stages_of(model) if stage.unit is not None and stage.attended]
    if not stages:
        raise InputError("the model has no attention unit, and so no attention maps")
    return stages


def uvit_blocks(model: UViT) -> list[Block]:
    """A UViT's blocks in the order in which it runs them."""
    return cast(list[Block], [*model.in_blocks, model.mid_block, *model.out_blocks])


def _uvit_stage(model: UViT) -> Stage:
    blocks = uvit_blocks(model)
    half = len(model.in_blocks)
    names = [f"in {i + 1}" for i in range(half)] + ["mid"] + [f"out {i + 1}" for i in range(len(model.out_blocks))]
    return Stage("", model.hidden_size, tuple(names), tuple(blocks), model.unit, tuple(model.attention_blocks))


def _known_runs(model: nn.Module) -> list[tuple[Position, ...]]:
    """The runs of positions with one channel count that attach() finds by itself; none in a network of another kind."""
    try:
        return group_by_channels(insertion_points(model))
    except InputError:
        return []


def _numbered(runs: Sequence[tuple[Position, ...]]) -> list[tuple[int | None, tuple[Position, ...]]]:
    """The runs with their numbers from 1; a single one has none."""
    return [(None if len(runs) == 1 else index + 1, run) for index, run in enumerate(runs)]


def _stage(
    model: nn.Module,
    number: int | None,
    positions: tuple[Position, ...],
    attended: tuple[Position, ...] = (),
    unit: nn.Module | None = None,
) -> Stage:
    """ "stage 1" with its blocks "1.1", "1.2", ...; without a number "" and "1", "2", ..."""
    prefix, name = ("", "") if number is None else (f"{number}.", f"stage {number}")
    names = [position.module for position in positions]
    return Stage(
        name,
        positions[0].channels or 0,
        tuple(f"{prefix}{index + 1}" for index in range(len(positions))),
        tuple(_block_around(model, module) for module in names),
        unit,
        tuple(names.index(position.module) for position in attended),
    )


def _block_around(model: nn.Module, name: str) -> nn.Module:
    """The block that a position lies in: what is listed in the network, or names the end of its residual branch."""
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


@contextmanager
def captured_maps(stages: Sequence[Stage]) -> Iterator[list[list[Tensor]]]:
    """Collects, for each stage, the maps (B, N), float32, that its unit multiplies features with, one a call.

    A spatial unit's map, which has a value at every position, is averaged over positions.
    """
    found: list[list[Tensor]] = [[] for _ in stages]
    with ExitStack() as hooks:
        for stage, maps in zip(stages, found, strict=True):
            assert stage.unit is not None
            hooks.callback(stage.unit.register_forward_hook(partial(_keep_map, maps)).remove)
        yield found


def _keep_map(maps: list[Tensor], unit: Any, given: tuple[Any, ...], returned: tuple[Tensor, Any]) -> None:
    features = given[0]
    h = unit.attention_map(returned[1]).to(features.device, torch.float32)
    if h.dim() == 4:
        h = h.mean((2, 3))
    maps.append(h.expand(len(features), features.shape[1 if is_map(features) else 2]))


@torch.no_grad()
def maps_during(stages: Sequence[Stage], run: Callable[[], Any]) -> list[Tensor]:
    """h (L, B, N), float32, of each of these stages' L attended blocks while `run` runs the network once."""
    with captured_maps(stages) as found:
        run()
    return [torch.stack(maps) for maps in found]
