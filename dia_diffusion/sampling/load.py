"""Loads pipelines of this project and of diffusers from folders, with safetensors and installed classes only."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging

from dia_diffusion.errors import InputError, first_line
from dia_diffusion.models.factory import check_layers, check_size, unusable
from dia_diffusion.models.registry import BACKBONES
from dia_diffusion.noise import PROCESSES
from dia_diffusion.pipelines.folder import (
    check_weights,
    components,
    find_guide,
    find_pipeline,
    model_files,
    model_hash,
    part_folder,
    read_config,
    read_index,
    weights_hash,
)
from dia_diffusion.pipelines.pipeline_uvit import UViTPipeline
from dia_diffusion.reading import read_header
from dia_diffusion.sampling.euler_maruyama import EulerMaruyamaScheduler
from dia_diffusion.sampling.samplers import SAMPLERS

# Prefixes of component names that show what a pipeline needs even if diffusers can't import its class.
NEEDS_BY_PART = {"text_encoder": "a prompt", "tokenizer": "a prompt", "image_encoder": "an input image"}
GIVEN = ("self", "batch_size", "class_labels", "generator", "num_inference_steps")  # arguments that sampling passes
BY_NAME = ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")
NETWORKS = ("unet", "transformer")
FLOATS = ("F", "BF")  # prefixes of dtype names in safetensors; others would be converted silently


def load_pipeline(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    step: int | None = None,
) -> DiffusionPipeline:
    """Loads a pipeline from its folder or from a run folder (see `find_pipeline`).

    Executes no code from the folder: if it contains this project's code, the installed classes are used instead.

    Args:
        path: the folder.
        device: where the models go.
        dtype: of the network; None is float32. A latent decoder is always float32.
        step: of a run's pipeline; None is the newest.

    Raises:
        InputError: there is no pipeline, it needs more than noise and classes, or weights are missing, truncated, from
            another model or not safetensors.
    """
    folder = find_pipeline(path, step)
    index = read_index(folder)
    kind = _pipeline_class(folder, index)
    classes = {name: _part_class(folder, name, *place) for name, place in components(index).items()}
    check_weights(folder)
    accepted = inspect.signature(kind.__init__).parameters.keys() & index.keys()
    given = {name: None if index[name] == [None, None] else index[name] for name in accepted}
    with _quiet_diffusers():
        given |= {name: _load_part(part_folder(folder, name), part) for name, part in classes.items()}
        try:
            pipeline = kind(**given).to(device)
        except Exception as error:  # a component is missing or of a kind that the pipeline doesn't accept
            raise InputError(f"{folder} can't be loaded: {first_line(error)}") from None
        for name in NETWORKS:
            if dtype is not None and getattr(pipeline, name, None) is not None:
                getattr(pipeline, name).to(dtype)
    return pipeline


@dataclass(frozen=True)
class Guide:
    """The pipeline for autoguidance."""

    pipeline: DiffusionPipeline
    hashes: dict[str, str]
    """weights_hash and model_hash of the folder, for records."""


def load_guide(name: str | None, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Guide | None:
    """The guide named by RUN, RUN:STEP or a pipeline folder, or None. For arguments and errors see `load_pipeline`."""
    if name is None:
        return None
    folder = find_guide(name)
    hashes = {"weights_hash": weights_hash(folder), "model_hash": model_hash(folder)}
    return Guide(load_pipeline(folder, device, dtype), hashes)


def _pipeline_class(folder: Path, index: dict[str, Any]) -> type[DiffusionPipeline]:
    name = index["_class_name"]
    wanted = f"the pipeline in {folder} must draw images from noise alone or by class"
    carries_code = isinstance(name, list)  # then it is [module in the folder, class]
    name = name[-1] if carries_code and name else name
    if name == UViTPipeline.__name__:
        return UViTPipeline
    kind = None if carries_code else _of_diffusers(name)
    if kind is None:
        reason = "custom code, which is never run" if carries_code else "which is not a class of diffusers"
        raise InputError(f"{wanted}, got a {name}, {reason}")
    if needed := _needs(kind, index):
        raise InputError(f"{wanted}, got a {name}, which needs {needed}")
    if not issubclass(kind, DiffusionPipeline) or "output_type" not in inspect.signature(kind.__call__).parameters:
        raise InputError(f"{wanted}, got a {name}, which draws no images")
    return kind


def _part_class(folder: Path, name: str, library: str, class_name: str) -> type:
    kind = _of_diffusers(class_name) if library == "diffusers" else _known_parts().get(class_name)
    if kind is None or not issubclass(kind, ModelMixin | SchedulerMixin):
        accepted = f"a model or scheduler of diffusers {diffusers.__version__} or this project"
        raise InputError(f"the {name} of {folder} must be {accepted}, got a {library}.{class_name}")
    return kind


def _known_parts() -> dict[str, type]:
    """The classes of registered backbones, and the schedulers of registered processes and samplers, by name."""
    kinds: list[Any] = [EulerMaruyamaScheduler, *(row.model for row in BACKBONES.values())]
    kinds += [process.scheduler_class for process in PROCESSES.values()]
    kinds += [sampler.scheduler for sampler in SAMPLERS.values() if not isinstance(sampler.scheduler, str)]
    return {kind.__name__: kind for kind in kinds}


def _of_diffusers(name: Any) -> type | None:
    try:
        kind = getattr(diffusers, name)
    except Exception:  # it imports lazily, which can raise anything
        return None
    return kind if isinstance(kind, type) else None


def _needs(kind: type, index: dict[str, Any]) -> str | None:
    """What a pipeline class needs in addition to noise and classes, in words; None if nothing."""
    for part, needed in NEEDS_BY_PART.items():
        if any(name.startswith(part) for name in components(index)):
            return needed
    if backends := getattr(kind, "_backends", None):  # diffusers' placeholder for a class with missing dependencies
        return f"the package {' and '.join(name for name in backends if find_spec(name) is None)}"
    arguments = inspect.signature(kind.__call__).parameters
    required = [
        name for name, value in arguments.items() if value.default is value.empty and value.kind.name in BY_NAME
    ]
    missing = [name for name in required if name not in GIVEN]
    missing = missing or [name for name in arguments if name in ("prompt", "image", "image_embeds")]
    return " and ".join(missing) or None


def _load_part(folder: Path, kind: Any) -> Any:
    try:
        if issubclass(kind, SchedulerMixin):
            read_config(folder / "scheduler_config.json")
            return kind.from_pretrained(folder, local_files_only=True)
        _check_before_loading(folder, kind)
        if "quantization_config" in kind.load_config(folder, local_files_only=True):
            raise ValueError("its config.json must have no quantization_config, got one")
        model, info = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except InputError:
        raise
    except Exception as error:  # diffusers has no specific exception for a folder that it can't read
        if "ignore_mismatched_sizes" in str(error):  # diffusers' advice if shapes differ
            raise InputError(f"{folder} holds weights of another model: its tensors have other shapes") from None
        raise InputError(f"{folder} can't be loaded: {first_line(error)}") from None
    # diffusers loads matching tensors and leaves the others at random values.
    if different := [*info["missing_keys"], *info["unexpected_keys"]]:
        raise InputError(f"{folder} holds weights of another model: they differ in tensor {min(different)}")
    if problem := unusable(model.state_dict(), model):
        raise InputError(f"{folder} holds weights with {problem}")
    return model.eval()


def _check_before_loading(folder: Path, kind: Any) -> None:
    """Raises InputError if the config can't match the stored weights, since diffusers would build the network first."""
    config = read_config(folder / "config.json")
    header = {name: about for file in model_files(folder) for name, about in read_header(file).items()}
    stored = {name: shape for name, (shape, _) in header.items()}
    try:
        check_layers(config, len(stored))  # each layer has at least one tensor
        own = check_size(lambda: kind.from_config(config), stored).state_dict()
    except InputError as error:
        raise InputError(f"{folder / 'config.json'} doesn't match the weights in its folder: {error}") from None
    for name, (_, dtype) in header.items():
        if name in own and own[name].is_floating_point() and not dtype.startswith(FLOATS):
            raise InputError(
                f"the weights in {folder} must be floating point numbers, got type {dtype} in tensor {name}"
            )


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Turns off diffusers' progress bar and warnings: what they report is raised here in one line."""
    verbosity, progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress_bar:
            logging.enable_progress_bar()
