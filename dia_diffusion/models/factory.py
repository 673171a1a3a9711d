"""Builds models from recipes and configs. Checks come before allocation, since configs may be untrusted."""

import inspect
import os
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dia_diffusion.errors import InputError, first_line
from dia_diffusion.models import attached, uvit  # noqa: F401  (they register backbones)
from dia_diffusion.models.registry import BACKBONES

Shapes = Mapping[str, tuple[int, ...]]


def build_model(config: Mapping[str, Any]) -> Any:
    """A recipe's model, with initial weights from torch's default generator.

    Args:
        config: the recipe's validated `model:` section: a `backbone` of BACKBONES and arguments of its class; others
            are ignored.

    Raises:
        InputError: an unknown backbone, or arguments that it refuses.
    """
    backbone = config.get("backbone", "uvit")
    accepted = recipe_arguments(backbone)
    arguments = {key: value for key, value in config.items() if key in accepted}
    if BACKBONES[backbone].network is not None:
        arguments["backbone"] = backbone
    return BACKBONES[backbone].model(**arguments)


def recipe_arguments(backbone: str) -> dict[str, inspect.Parameter]:
    """The arguments of a backbone's class that a recipe's `model:` may set. Raises InputError: an unknown backbone."""
    row = BACKBONES.choose(backbone, "model.backbone")
    left_out = {"backbone", *row.not_in_recipes}
    parameters = inspect.signature(row.model, eval_str=True).parameters
    return {name: p for name, p in parameters.items() if name not in left_out and p.kind is p.POSITIONAL_OR_KEYWORD}


def check_layers(config: Mapping[str, Any], most: int) -> None:
    """Raises InputError for a config with more than `most` layers or LSTM cells, which would be slow to build."""
    for key, value in config.items():
        counts = value if isinstance(value, list) else [value]
        largest = max((count for count in counts if isinstance(count, int | float)), default=0)
        if ("layers" in key or key == "num_cells") and largest > most:
            raise InputError(f"`{key}` must be {most:,} or less, got {value}")
        if isinstance(value, dict):
            check_layers(value, most)


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """The result of `build` on the meta device, without memory for weights. Raises InputError if it fails."""
    try:
        with torch.device("meta"):
            return build()
    except InputError:
        raise
    except Exception as error:  # a config may hold anything
        raise InputError(f"the network can't be built: {first_line(error)}") from None


def check_size(build: Callable[[], nn.Module], stored: Shapes) -> nn.Module:
    """The model on the meta device. Raises InputError if it has more parameters than the stored tensors."""
    model = build_on_meta(build)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    held = sum(map(prod, stored.values()))
    if wanted > held:
        raise InputError(f"parameters of the network must be {held:,} at most, as many as its weights, got {wanted:,}")
    return model


def check_memory(model: nn.Module) -> None:
    """Raises InputError if the model's weights are larger than this machine's memory."""
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    if needed > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise InputError(f"the model's weights must fit into {memory >> 30:,} GiB of memory, got {needed >> 30:,} GiB")


def unusable(tensors: Mapping[str, Tensor], model: nn.Module) -> str | None:
    """Why tensors can't be a model's weights: a wrong kind of dtype, or non-finite values; None if they can."""
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name in own and tensor.is_floating_point() != own[name].is_floating_point():
            return f"dtype {tensor.dtype} for tensor {name}, which must be {own[name].dtype}"
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"values in tensor {name} that aren't finite"
    return None
