"""Models built from what a recipe or a config says, with checks before memory is taken: configs may be made up."""

import inspect
import os
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dia_diffusion.errors import InputError, first_line
from dia_diffusion.models import attached, uvit  # noqa: F401  (they add their rows)
from dia_diffusion.models.registry import BACKBONES

Shapes = Mapping[str, tuple[int, ...]]


def build_model(config: Mapping[str, Any]) -> Any:
    """A recipe's model, with first weights from torch's default generator.

    Args:
        config: the recipe's `model:`, a `backbone` of BACKBONES and arguments of its class.

    Raises:
        InputError: an unknown backbone, or arguments that it refuses.
    """
    backbone = config.get("backbone", "uvit")
    accepted = recipe_arguments(backbone)
    arguments = {key: value for key, value in config.items() if key in accepted or value not in (None, "none")}
    if BACKBONES[backbone].network is None:
        arguments.pop("backbone", None)
    return BACKBONES[backbone].model(**arguments)


def recipe_arguments(backbone: str) -> dict[str, inspect.Parameter]:
    """The arguments of a backbone's class that a recipe's `model:` may have.

    Raises:
        InputError: an unknown backbone.
    """
    row = BACKBONES.choose(backbone, "model.backbone")
    left_out = {"backbone", *row.not_in_recipes}
    parameters = inspect.signature(row.model, eval_str=True).parameters
    return {name: parameter for name, parameter in parameters.items() if name not in left_out}


def check_layers(config: Mapping[str, Any], most: int) -> None:
    """Raises InputError for a config of more layers than `most`, which would be built one after the other."""
    for key, value in config.items():
        counts = value if isinstance(value, list) else [value]
        largest = max((count for count in counts if isinstance(count, int | float)), default=0)
        if "layers" in key and largest > most:
            raise InputError(f"{key} is {value}; accepted: {most:,} or fewer")
        if isinstance(value, dict):
            check_layers(value, most)


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, without memory for its weights. Raises InputError for arguments that it refuses."""
    try:
        with torch.device("meta"):
            return build()
    except InputError:
        raise
    except Exception as error:  # whatever a network makes of arguments that anybody may have written
        raise InputError(f"no network can be built by it: {first_line(error)}") from None


def check_size(build: Callable[[], nn.Module], stored: Shapes) -> nn.Module:
    """The model on the meta device. Raises InputError for one that has more numbers than the stored tensors."""
    model = build_on_meta(build)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    held = sum(map(prod, stored.values()))
    if wanted > held:
        raise InputError(f"its network has {wanted:,} numbers, and the weights {held:,}")
    return model


def check_memory(model: nn.Module) -> None:
    """Raises InputError for a model whose weights this machine can't hold."""
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    if needed > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise InputError(
            f"the model's weights take {needed >> 30:,} GiB; accepted: the {memory >> 30:,} of this machine"
        )


def unusable(tensors: Mapping[str, Tensor], model: nn.Module) -> str | None:
    """What keeps tensors from being a model's weights: another kind of numbers, or some that aren't finite."""
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name in own and tensor.is_floating_point() != own[name].is_floating_point():
            return f"the type {tensor.dtype} for tensor {name}; accepted: {own[name].dtype}"
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"values in tensor {name} that aren't finite"
    return None
