"""Checkpoints: everything needed to resume, as safetensors and JSON, written atomically.

    checkpoints/step-00010000/model.safetensors       weights
                              ema.safetensors         their moving average, if the training keeps one
                              averages.safetensors    further averages, if the recipe has any: NAME/PARAMETER
                              optimizer.safetensors   the optimizer's state, a tensor per parameter and quantity
                              state.json              step, recipe, data, sha256 of the other files, own checksum

If the newest is damaged and an older one is intact, training resumes from that one, and renames the damaged one to
step-00010000.damaged.

They contain no random state: a step's randomness is a function of the seed and the step.
"""

import shutil
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dia_diffusion.errors import InputError
from dia_diffusion.io import (
    atomic_dir,
    sha256_of_file,
    step_folders,
    step_name,
    verify_checksum,
    with_checksum,
    write_json,
)
from dia_diffusion.reading import read_json_object


@dataclass
class Checkpoint:
    """The content of a checkpoint."""

    tensors: dict[str, dict[str, Tensor]]  # "model", "optimizer", and "ema", "averages" if kept -> name -> tensor
    state: dict[str, Any]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, keep_last: int) -> Path:
    """Writes folder/step-N, then removes earlier ones, so that the keep_last newest remain, including this one."""
    place = folder / step_name(step)
    write_checkpoint(place, step, checkpoint)
    for old in [other for number, other in step_folders(folder).items() if number <= step][:-keep_last]:
        shutil.rmtree(old)
    return place


def write_checkpoint(place: Path, step: int, checkpoint: Checkpoint) -> None:
    """Writes a folder of safetensors and state.json, replacing an earlier one."""
    size = sum(tensor.nbytes for tensors in checkpoint.tensors.values() for tensor in tensors.values())
    with atomic_dir(place, needed=size) as temporary:
        hashes = {}
        for name, tensors in checkpoint.tensors.items():
            file = temporary / f"{name}.safetensors"
            save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, file)
            hashes[file.name] = sha256_of_file(file)
        write_json(temporary / "state.json", with_checksum({**checkpoint.state, "step": step, "sha256": hashes}))


def newest_intact_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest intact checkpoint in `folder`, and the newer, damaged ones, each with the reason.

    None instead of a checkpoint if there are none.

    Raises:
        InputError: all are damaged.
    """
    damaged: dict[Path, str] = {}
    for place in reversed(step_folders(folder).values()):
        try:
            check_checkpoint(place)
            return place, damaged
        except InputError as error:
            damaged[place] = str(error)
    if damaged:
        newest, *_ = damaged.values()
        otherwise = "restore one from a backup, or choose another output"
        raise InputError(f"{newest}; no checkpoint in {folder} is intact: {otherwise}")
    return None, {}


def set_aside(damaged: Path) -> Path:
    """Renames a damaged checkpoint to NAME.damaged, so that it isn't counted by keep_last and its name is free."""
    names = (f"{damaged.name}.damaged", *(f"{damaged.name}.damaged-{number}" for number in range(2, 1000)))
    place = next(place for name in names if not (place := damaged.with_name(name)).exists())
    return damaged.rename(place)


def check_checkpoint(place: Path) -> dict[str, Any]:
    """Compares every file of a checkpoint with its checksum, and returns its state.

    Raises:
        InputError: a file is missing, truncated or corrupted.
    """
    state = read_state(place)
    check_files(place, state, "checkpoint")
    return state


def check_files(place: Path, state: dict[str, Any], what: str) -> None:
    """Raises InputError if a file doesn't match the state. `what` is the kind of folder, for the message."""
    for name, sha256 in state["sha256"].items():
        file = place / name
        if not file.is_file():
            raise InputError(f"{what} file {file} is missing")
        if sha256_of_file(file) != sha256:
            raise InputError(f"{what} file {file} is truncated or corrupted (its sha256 differs)")


def load_checkpoint(place: Path, checked: bool = False) -> Checkpoint:
    """Reads a checkpoint, comparing every file with its checksum unless the caller just has.

    Raises:
        InputError: a file is missing, truncated or corrupted.
    """
    state, tensors = read_state(place) if checked else check_checkpoint(place), {}
    for file in (place / name for name in state["sha256"]):
        tensors[file.stem] = read_tensors(file, "checkpoint")
    return Checkpoint(tensors, state)


def read_tensors(file: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a file. Raises InputError if it isn't a safetensors file."""
    try:
        return load_file(file)
    except SafetensorError as error:
        raise InputError(f"{what} file {file} is not safetensors ({error})") from None


def read_state(place: Path) -> dict[str, Any]:
    """A checkpoint's state.json: step, recipe, data, sha256 of the other files, which are not read.

    Raises:
        InputError: it is missing, truncated or corrupted.
    """
    needed = {"model.safetensors", "optimizer.safetensors"}
    allowed = needed | {"ema.safetensors", "averages.safetensors"}
    return read_folder_state(place, "checkpoint", lambda files: needed <= files <= allowed)


def read_folder_state(place: Path, what: str, has_files: Callable[[Set[str]], bool]) -> dict[str, Any]:
    """The state.json that `write_checkpoint` wrote. has_files: whether its file names are valid for such a folder.

    Raises:
        InputError: it is missing, truncated or corrupted.
    """
    try:
        state = verify_checksum(read_json_object(place / "state.json"))
        described = isinstance(state["recipe"], dict) and isinstance(state["data"], dict)
        if has_files(dict(state["sha256"]).keys()) and described and step_name(state["step"]) == place.name:
            return state
    # Other disk errors may be temporary, and the checkpoint intact.
    except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{what} file {place / 'state.json'} is missing, truncated or corrupted")


def newest_state(folder: Path) -> dict[str, Any] | None:
    """The newest readable checkpoint state in `folder`; None if there is no checkpoint.

    Raises:
        InputError: there are checkpoints, but no state can be read.
    """
    failure = None
    for place in reversed(step_folders(folder).values()):
        try:
            return read_state(place)
        except InputError as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return None


def began_in(folder: Path) -> Any:
    """The precision of the run with these checkpoints; None if no checkpoint says it."""
    try:
        state = newest_state(folder)
    except InputError:  # reported when a checkpoint is loaded
        return None
    return None if state is None else state["recipe"].get("train", {}).get("mixed_precision")


def load_weights(module: nn.Module, tensors: dict[str, Tensor], place: Path) -> None:
    """Loads tensors into a module in place.

    Raises:
        InputError: names or shapes differ, so the checkpoint is of another model.
    """
    own = module.state_dict()
    differing = sorted(own.keys() ^ tensors.keys()) or [n for n in own if own[n].shape != tensors[n].shape]
    if differing:
        raise InputError(f"checkpoint {place} is of another model: {differing[0]} does not fit")
    module.load_state_dict(tensors)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer state of a model's parameters as "PARAMETER/QUANTITY" -> tensor."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None  # such as the momentum buffer of SGD without momentum
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], model: nn.Module) -> None:
    """Restores the state that optimizer_tensors returned."""
    state: dict[int, dict[str, Tensor]] = {}
    parameters = dict(model.named_parameters())
    in_order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {parameter: index for index, parameter in enumerate(in_order)}
    for key, tensor in tensors.items():
        name, quantity = key.rsplit("/", 1)
        parameter = parameters[name]
        if tensor.shape == parameter.shape:  # keep the parameter's memory format, which fused kernels expect
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(index[parameter], {})[quantity] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
