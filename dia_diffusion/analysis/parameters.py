"""How many parameters attention units add to a model, and how many sharing saves (arXiv 2210.16101, III-A and III-D).

Parameters are counted on torch's meta device, which allocates no memory.
"""

import re
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from dia_diffusion.analysis.stages import Stage
from dia_diffusion.attention import UNITS, build_attention
from dia_diffusion.errors import InputError
from dia_diffusion.models.classifier_config import BackboneConfig
from dia_diffusion.models.classifiers import ACCEPTED, PATTERNS, RESNETS, VITS, build_classifier
from dia_diffusion.models.uvit import UVIT_SIZES, UViT
from dia_diffusion.training.config import ClassifyExperiment, Experiment, ModelConfig
from dia_diffusion.training.diffusion import build_model
from dia_diffusion.training.recipe import read_experiment


@dataclass(frozen=True)
class Added:
    """The parameters that a unit adds to a model."""

    unit: str
    shared: int
    individual: int | None
    """With a separate module for each block; None for units that can only be shared."""

    @property
    def saving(self) -> float | None:
        """The fraction of the individual modules' parameters that sharing saves, 0 to 1."""
        return 1 - self.shared / self.individual if self.individual else None


def count_parameters(module: nn.Module) -> int:
    """The elements of all parameters, each counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def unit_parameters(stages: list[Stage], unit: str, **options: Any) -> int:
    """The number of parameters of a unit, with one instance per stage.

    Raises:
        InputError: no such unit, or options that it refuses.
    """
    total = 0
    with torch.device("meta"):
        for stage in stages:
            built = build_attention(unit, stage.channels, num_blocks=len(stage.blocks), **options)
            total += 0 if built is None else count_parameters(built)
    return total


def added_parameters(stages: list[Stage], unit: str, **options: Any) -> Added:
    """The parameters that a unit adds, shared and individual.

    Raises:
        InputError: no such unit, options that it refuses, or `sharing` among them.
    """
    if "sharing" in options:
        raise InputError("the unit's arguments must be without `sharing`, since both are counted")
    individual = None
    if unit in UNITS and UNITS[unit].can_be_individual:
        individual = unit_parameters(stages, unit, **{**options, "sharing": "individual"})
    return Added(unit, unit_parameters(stages, unit, **options), individual)


Config = TypeVar("Config", ModelConfig, BackboneConfig)

CLASSES = 100  # of CIFAR-100, as in the paper's counts
IMAGENET_CLASSES = 1000


def model_named(name: str) -> nn.Module:
    """A model without a unit: a UViT size ("S/2"), a classifier ("cifar-resnet164", "resnet50"), or a recipe's model.

    CIFAR classifiers have 100 classes; ImageNet classifiers have 1,000 classes and take 224x224 images.

    Raises:
        InputError: no model has that name.
    """
    with torch.device("meta"):
        if name.partition("/")[0] in UVIT_SIZES and "/" in name:
            return UViT.from_size(name, attention=None)
        if any(re.fullmatch(pattern, name) for pattern in PATTERNS.values()):
            return build_classifier(BackboneConfig(backbone=name, num_classes=CLASSES))
        if name in RESNETS or name in VITS:
            return build_classifier(BackboneConfig(backbone=name, sample_size=224, num_classes=IMAGENET_CLASSES))
        experiment = recipe_named(name)
        if isinstance(experiment, ClassifyExperiment):
            return build_classifier(without_unit(experiment.model))
        return build_model(without_unit(experiment.model))


def recipe_named(name: str) -> Experiment | ClassifyExperiment:
    """A recipe of `train` or `classify`, by path or by the name of a shipped recipe.

    Raises:
        InputError: it is neither of these.
    """
    try:
        return read_experiment(name)
    except InputError as error:
        try:
            return read_experiment(name, kind=ClassifyExperiment)
        except InputError:
            sizes = ", ".join(f"{size}/PATCH" for size in UVIT_SIZES)
            raise InputError(f"a model must be {sizes}, {ACCEPTED}, or a recipe, got {name!r} ({error})") from None


def without_unit(config: Config) -> Config:
    """A recipe's model with no attention unit."""
    unit: dict[str, Any] = {key: None for key in config.model_dump() if key.startswith("attention_")}
    return config.model_copy(update={"attention": "none", **unit})
