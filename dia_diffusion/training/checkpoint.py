"""Checkpoints: all that resuming needs, as safetensors and JSON, whole or not there at all.

    checkpoints/step-00010000/model.safetensors       weights
                              ema.safetensors         their moving average, of trainings that keep one
                              optimizer.safetensors   the optimizer's state, a tensor per parameter and quantity
                              state.json              step, recipe, data, sha256 of the other files

Nothing random is in it: a step's randomness is a function of the seed and the step.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dia_diffusion.errors import InputError
from dia_diffusion.files import sha256_of_file, step_folders, step_name, whole_folder, write_json
from dia_diffusion.reading import read_json_object


@dataclass
class Checkpoint:
    """A checkpoint's content."""

    tensors: dict[str, dict[str, Tensor]]  # "model", "ema" where one is kept, "optimizer" -> name -> tensor
    state: dict[str, Any]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, keep_last: int) -> Path:
    """Writes folder/step-N, then removes all but the keep_last newest."""
    place = folder / step_name(step)
    with whole_folder(place) as temporary:
        hashes = {}
        for name, tensors in checkpoint.tensors.items():
            file = temporary / f"{name}.safetensors"
            save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, file)
            hashes[file.name] = sha256_of_file(file)
        write_json(temporary / "state.json", {**checkpoint.state, "step": step, "sha256": hashes})
    for old in list(step_folders(folder).values())[:-keep_last]:
        shutil.rmtree(old)
    return place


def load_checkpoint(place: Path) -> Checkpoint:
    """Reads a checkpoint, checking every file against its sha256.

    Raises:
        InputError: a file is missing, cut short or altered.
    """
    state = read_state(place)
    tensors = {}
    for file in (place / name for name in state["sha256"]):
        if not file.is_file():
            raise InputError(f"checkpoint file {file} is missing; {_advice(place)}")
        if sha256_of_file(file) != state["sha256"].get(file.name):
            raise InputError(f"checkpoint file {file} is cut short or altered (its sha256 differs); {_advice(place)}")
        try:
            tensors[file.stem] = load_file(file)
        except SafetensorError as error:
            raise InputError(f"checkpoint file {file} is not safetensors ({error}); {_advice(place)}") from None
    return Checkpoint(tensors, state)


def read_state(place: Path) -> dict[str, Any]:
    """A checkpoint's state.json: step, recipe, data, sha256 of the other files, which are not read.

    Raises:
        InputError: it is missing, cut short or altered.
    """
    try:
        state = read_json_object(place / "state.json")
        files = {"model.safetensors", "optimizer.safetensors"}
        has_files = files <= dict(state["sha256"]).keys() <= files | {"ema.safetensors"}
        described = isinstance(state["recipe"], dict) and isinstance(state["data"], dict)
        if has_files and described and step_name(state["step"]) == place.name:
            return state
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"checkpoint file {place / 'state.json'} is missing, cut short or altered; {_advice(place)}")


def _advice(place: Path) -> str:
    return f"remove {place} to go on from the checkpoint before it"


def load_weights(module: nn.Module, tensors: dict[str, Tensor], place: Path) -> None:
    """Puts tensors into a module in place.

    Raises:
        InputError: names or shapes differ: the checkpoint is another model's.
    """
    own = module.state_dict()
    differing = sorted(own.keys() ^ tensors.keys()) or [n for n in own if own[n].shape != tensors[n].shape]
    if differing:
        raise InputError(f"checkpoint {place} is of another model: {differing[0]} does not fit")
    module.load_state_dict(tensors)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimizer's state as "PARAMETER/QUANTITY" -> tensor; names in the order of the optimizer's parameters."""
    state = optimizer.state_dict()["state"]
    return {
        f"{names[i]}/{key}": value
        for i, values in state.items()
        for key, value in values.items()
        if value is not None  # as the momentum of an SGD without momentum
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], names: list[str]) -> None:
    """Puts back what optimizer_tensors gave."""
    state: dict[int, dict[str, Tensor]] = {}
    place = {name: index for index, name in enumerate(names)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, tensor in tensors.items():
        name, quantity = key.rsplit("/", 1)
        parameter = parameters[place[name]]
        if tensor.shape == parameter.shape:  # in its memory format, which fused kernels count on
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(place[name], {})[quantity] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
