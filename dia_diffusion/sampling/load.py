"""Pipelines from folders: this project's and diffusers' unconditional ones, from safetensors only."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open

from dia_diffusion.errors import InputError
from dia_diffusion.files import sha256_of_file, step_folders
from dia_diffusion.models.uvit import UViT
from dia_diffusion.pipelines.pipeline_uvit import UViTPipeline

PIPELINE_CLASSES = ("UViTPipeline", "DDPMPipeline", "DDIMPipeline")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def find_pipeline(path: str | Path, step: int | None = None) -> Path:
    """The pipeline folder at `path`, or of a run folder the pipeline of that step, by default the newest.

    Raises:
        InputError: nothing there, neither kind of folder, or no pipeline of that step.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; accepted: a pipeline folder or a run folder")
    if (path / "model_index.json").is_file():
        if step is not None:
            raise InputError(f"{path} is one pipeline, not a run: it has no step {step} to choose")
        return path
    steps = {
        step: folder
        for step, folder in step_folders(path / "pipelines").items()
        if (folder / "model_index.json").is_file()
    }
    if not steps:
        raise InputError(
            f"{path} is neither a pipeline folder (it has no model_index.json) nor a run folder with pipelines/step-*"
        )
    chosen = max(steps) if step is None else step
    if chosen not in steps:
        raise InputError(f"{path} has no pipeline of step {step}; accepted: {', '.join(map(str, sorted(steps)))}")
    return steps[chosen]


def load_pipeline(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    step: int | None = None,
) -> UViTPipeline:
    """A pipeline from its folder or, by `find_pipeline`, from a run's. Runs nothing that lies in the folder.

    Args:
        path: the folder.
        device: where the model goes.
        dtype: of the model; None is float32.
        step: of a run's pipelines; None is the newest.

    Raises:
        InputError: no pipeline there, one of another class, or weights that are missing, cut short, of another model
            or not safetensors.
    """
    folder = find_pipeline(path, step)
    try:
        name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError, OSError):
        raise InputError(f"{folder / 'model_index.json'} is not the index of a diffusers pipeline") from None
    if name not in PIPELINE_CLASSES:
        raise InputError(f"{folder} holds a {name}; accepted: {', '.join(PIPELINE_CLASSES)}")
    stored = _tensor_names(folder)
    try:
        with _quiet_diffusers():
            pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except Exception as error:  # diffusers has no type of its own for a folder that it can't read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder} can't be loaded: {reason}") from None
    # diffusers loads what fits and leaves other tensors at random values.
    if different := stored ^ pipeline.unet.state_dict().keys():
        raise InputError(f"{folder / 'unet'} holds weights of another model: they differ in tensor {min(different)}")
    return adapt_pipeline(pipeline).to(device=device, dtype=dtype)


def adapt_pipeline(pipeline: DiffusionPipeline) -> UViTPipeline:
    """A UViTPipeline around the same model, with a scheduler of its own.

    Its loop does for any unconditional pixel-space model what DDPMPipeline and DDIMPipeline do, with every scheduler.

    Raises:
        InputError: a pipeline that can't be sampled that way.
    """
    unet = getattr(pipeline, "unet", None)
    if not isinstance(unet, UViT):
        name = type(pipeline).__name__
        if name not in PIPELINE_CLASSES or unet is None:
            raise InputError(f"can't sample from a {name}; accepted: {', '.join(PIPELINE_CLASSES)}")
        config = unet.config
        if config.get("num_class_embeds") or config.get("class_embed_type"):
            raise InputError(f"this {name}'s model is class-conditional; accepted: unconditional ones")
        if not isinstance(config.sample_size, int):
            raise InputError(f"this {name}'s model has sample_size {config.sample_size}; accepted: one number")
        unet.in_channels, unet.num_classes = config.in_channels, None
    return UViTPipeline(unet=unet, scheduler=copy.deepcopy(pipeline.scheduler))


def weights_hash(folder: str | Path) -> str:
    """The sha256 of the weights file of a pipeline folder's model."""
    return sha256_of_file(_weights_file(Path(folder)))


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """No progress bar and no warnings from diffusers: what they tell is raised here, in one line."""
    verbosity, progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress_bar:
            logging.enable_progress_bar()


def _weights_file(folder: Path) -> Path:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if not file.is_file():
        pickles = sorted(other.name for other in file.parent.glob("*") if other.suffix in PICKLES)
        instead = f"; {pickles[0]} beside it is a pickle, which is never read" if pickles else ""
        raise InputError(f"{file} is missing{instead}; accepted: weights as safetensors, in one file")
    return file


def _tensor_names(folder: Path) -> set[str]:
    file = _weights_file(folder)
    try:
        with safe_open(file, framework="pt") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is cut short or not safetensors: {error}") from None
