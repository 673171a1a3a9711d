"""A pipeline's folder: which it is, its index, its weights and whether they are whole, hashes of both, its records."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dia_diffusion.errors import InputError
from dia_diffusion.files import sha256_of_file, step_folders

INDEX = "model_index.json"
EVALUATIONS = "evaluations.jsonl"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARDS = f"{WEIGHTS}.index.json"
INCIDENTAL = ("_diffusers_version", "_name_or_path")
"""What a model's config says of who wrote it, not of the model."""


def find_pipeline(path: str | Path, step: int | None = None) -> Path:
    """The pipeline folder at `path`, or of a run folder the pipeline of that step, by default the newest.

    Raises:
        InputError: nothing there, neither kind of folder, or no pipeline of that step.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; accepted: a pipeline folder or a run folder")
    if (path / INDEX).is_file():
        if step is not None:
            raise InputError(f"{path} is one pipeline, not a run: it has no step {step} to choose")
        return path
    steps = {step: folder for step, folder in step_folders(path / "pipelines").items() if (folder / INDEX).is_file()}
    if not steps:
        raise InputError(
            f"{path} is neither a pipeline folder (it has no model_index.json) nor a run folder with pipelines/step-*"
        )
    chosen = max(steps) if step is None else step
    if chosen not in steps:
        raise InputError(f"{path} has no pipeline of step {step}; accepted: {', '.join(map(str, sorted(steps)))}")
    return steps[chosen]


def read_index(folder: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline folder.

    Raises:
        InputError: a file that is none.
    """
    file = folder / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        if index["_class_name"]:
            return index
    except (ValueError, KeyError, TypeError, OSError, RecursionError):  # the last where it is nested deeply
        pass
    raise InputError(f"{file} is not the index of a diffusers pipeline")


def class_name(index: dict[str, Any]) -> str:
    """The class that an index names, by its name or as [module, name]."""
    entry = index.get("_class_name")
    return str(entry[-1] if isinstance(entry, list) and entry else entry)


def components(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """name -> (library, class) of the parts that a pipeline's index names and its folder holds."""
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if not name.startswith("_")
        and isinstance(value, list)
        and len(value) == 2
        and all(isinstance(part, str) for part in value)
    }


def records_file(folder: str | Path) -> Path:
    """Where a pipeline's evaluations lie: in its run, or in the folder itself where it is in none."""
    place = Path(folder).resolve()
    run = place.parent.parent
    inside = place.parent == run / "pipelines" and (run / "config.yaml").is_file()  # as `RunFolder` names them
    return run / EVALUATIONS if inside else Path(folder) / EVALUATIONS


def part_folder(folder: Path, name: str) -> Path:
    """Where a part of a pipeline lies; the first pipelines that diffusers had are without subfolders."""
    return folder / name if (folder / name).is_dir() else folder


def is_scheduler(class_name: str) -> bool:
    """Whether a part is a scheduler, by the name of its class; all other parts of image pipelines have weights."""
    return class_name.endswith("Scheduler")


def weights_files(folder: Path) -> list[Path]:
    """The weights files of a pipeline folder's models, or their shards.

    Raises:
        InputError: a model whose weights are missing or not safetensors.
    """
    models = [name for name, (_, kind) in components(read_index(folder)).items() if not is_scheduler(kind)]
    return [file for name in sorted(models) for file in _files_of(part_folder(folder, name))]


def weights_hash(folder: str | Path) -> str:
    """One value for the weights of a pipeline folder: the sha256 of the file, or over those of several files.

    Raises:
        InputError: as `weights_files`.
    """
    folder = Path(folder)
    files = weights_files(folder)
    if len(files) == 1:
        return sha256_of_file(files[0])
    lines = [f"{sha256_of_file(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def model_hash(folder: str | Path) -> str:
    """One value for what a pipeline does with its weights: sha256 over its class and the configs of its parts.

    Its scheduler's is among them: it defines the noise process, also for samplers that take its place.

    Raises:
        InputError: a config that can't be read.
    """
    folder = Path(folder)
    index = read_index(folder)
    configs = {
        name: _config(part_folder(folder, name) / ("scheduler_config.json" if is_scheduler(kind) else "config.json"))
        for name, (_, kind) in components(index).items()
    }
    described = json.dumps([class_name(index), configs], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def check_weights(folder: Path) -> None:
    """Raises InputError unless all of a pipeline folder's weights are there, whole, and safetensors."""
    for file in weights_files(folder):
        stored_shapes(file)


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """tensor name -> shape, from the header of a safetensors file.

    Raises:
        InputError: a file that is cut short or none.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is cut short or not safetensors: {error}") from None


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return {name: value for name, value in config.items() if name not in INCIDENTAL}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} can't be read as a model's config ({error})") from None


def _files_of(model: Path) -> list[Path]:
    if (model / SHARDS).is_file():  # which diffusers too prefers to a single file beside it
        try:
            shards = set(json.loads((model / SHARDS).read_text(encoding="utf-8"))["weight_map"].values())
            files = [model / name for name in sorted(shards)]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{model / SHARDS} is not an index of safetensors files") from None
    else:
        files = [model / WEIGHTS]
    for file in files:
        if not file.is_file():
            pickles = sorted(other.name for other in model.glob("*") if other.suffix in PICKLES)
            instead = f"; {pickles[0]} beside it is a pickle, which is never read" if pickles else ""
            raise InputError(f"{file} is missing{instead}; accepted: weights as safetensors")
    return files
