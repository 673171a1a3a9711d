"""What attention units add to a model's parameters, and what sharing them saves (arXiv 2210.16101, III-A and III-D).

Everything is counted of modules on torch's meta device, which take no memory.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dia_diffusion.attention import UNITS, build_attention
from dia_diffusion.attention.insertion_points import group_by_channels, insertion_points
from dia_diffusion.errors import InputError
from dia_diffusion.models.uvit import UViT


@dataclass(frozen=True)
class Stage:
    """A run of blocks with one channel count, which share a unit."""

    channels: int
    blocks: int


@dataclass(frozen=True)
class Added:
    """The parameters that a unit adds to a model."""

    unit: str
    shared: int
    individual: int | None
    """With a module of its own for each block; None of units that are one for all blocks by nature."""

    @property
    def saving(self) -> float | None:
        """The share of the individual modules' parameters that sharing saves, 0 to 1."""
        return 1 - self.shared / self.individual if self.individual else None


def count_parameters(module: nn.Module) -> int:
    """The elements of all parameters, each counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def stages_of(model: nn.Module) -> list[Stage]:
    """The stages of a UViT, which is one, or of any model that attach() knows.

    Raises:
        InputError: a model without known blocks.
    """
    if isinstance(model, UViT):
        return [Stage(model.hidden_size, model.config.num_layers)]
    return [Stage(run[0].channels or 0, len(run)) for run in group_by_channels(insertion_points(model))]


def unit_parameters(stages: list[Stage], unit: str, **options: Any) -> int:
    """The parameters of the units of that name, one a stage.

    Raises:
        InputError: no such unit, or options that it refuses.
    """
    total = 0
    with torch.device("meta"):
        for stage in stages:
            built = build_attention(unit, stage.channels, num_blocks=stage.blocks, **options)
            total += 0 if built is None else count_parameters(built)
    return total


def added_parameters(stages: list[Stage], unit: str, **options: Any) -> Added:
    """What a unit adds, shared and individual.

    Raises:
        InputError: no such unit, options that it refuses, or a sharing among them.
    """
    if "sharing" in options:
        raise InputError("sharing is among the unit's arguments; both are counted, leave it out")
    individual = None
    if unit in UNITS and UNITS[unit].can_be_individual:
        individual = unit_parameters(stages, unit, **{**options, "sharing": "individual"})
    return Added(unit, unit_parameters(stages, unit, **options), individual)
