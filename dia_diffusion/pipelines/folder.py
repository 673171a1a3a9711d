"""Pipeline folders: finding them, their index, their weights and whether those are intact, hashes, and records."""

import hashlib
from pathlib import Path
from typing import Any

from dia_diffusion.errors import InputError
from dia_diffusion.io import sha256_of_file, sha256_of_json, step_folders
from dia_diffusion.reading import Unreadable, read_json_object, stored_shapes

INDEX = "model_index.json"
EVALUATIONS = "evaluations.jsonl"
CONVERTED_FILE = "converted.json"  # written by a converter: the source's name and sha256
TRAINING_FILE = "training.json"  # written by a run: run, step, images, weights, recipe, data
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARDS = f"{WEIGHTS}.index.json"
INCIDENTAL = ("_diffusers_version", "_name_or_path")
"""Keys of a model's config that describe who wrote it, not the model."""

# The keys of training.json that are read, as dotted names, with their types.
NEEDED: dict[str, Any] = {
    "run": str,
    "step": int,
    "images": int,
    "weights": str,
    "recipe.seed": int,
    "recipe.data": dict,
    "recipe.train.batch_size": int,
    "recipe.model.attention": str | None,
    "recipe.model.num_classes": int | None,
    "recipe.model.sample_size": object,
    "recipe.samples.count": int,
    "data.name": str,
    "data.count": int,
}
NEEDED_OF_UVIT = {"recipe.model.hidden_size": object, "recipe.model.num_layers": object}
STARTED_FROM = {"init_from.path": str, "init_from.weights_sha256": str}


def find_pipeline(path: str | Path, step: int | None = None) -> Path:
    """The pipeline folder at `path`, or, if `path` is a run folder, its pipeline at that step (None: the newest).

    Raises InputError: nothing is there, neither kind of folder, or no pipeline at that step.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; it must be a pipeline folder or a run folder")
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
        raise InputError(
            f"the step of a pipeline in {path} must be one of {', '.join(map(str, sorted(steps)))}, got {step}"
        )
    return steps[chosen]


def find_guide(name: str) -> Path:
    """The pipeline folder of a guide, given as a pipeline folder, a run, or RUN:STEP. Raises InputError otherwise."""
    run, _, step = name.rpartition(":")
    try:
        if not name:
            raise InputError("a pipeline must have a name, got none")
        if run and step.isdecimal() and not Path(name).exists():
            return find_pipeline(run, int(step))
        return find_pipeline(name)
    except InputError as error:
        raise InputError(f"`guide`: {error}") from None


def read_index(folder: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline folder. Raises InputError for an invalid file."""
    file = folder / INDEX
    try:
        index = read_json_object(file)
        if index["_class_name"]:
            return index
    except (Unreadable, KeyError, OSError):
        pass
    raise InputError(f"{file} is not the index of a diffusers pipeline")


def class_name(index: dict[str, Any]) -> str:
    """The class that an index names, as a name or as [module, name]."""
    entry = index.get("_class_name")
    return str(entry[-1] if isinstance(entry, list) and entry else entry)


def components(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """name -> (library, class) of the components that a pipeline's index names and its folder contains."""
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if not name.startswith("_")
        and isinstance(value, list)
        and len(value) == 2
        and all(isinstance(part, str) for part in value)
    }


def records_file(folder: str | Path) -> Path:
    """The file with a pipeline's evaluations: in its run, or in the pipeline folder itself if it is in no run."""
    place = Path(folder).resolve()
    run = place.parent.parent
    inside = place.parent == run / "pipelines" and (run / "config.yaml").is_file()  # the names in `RunFolder`
    return run / EVALUATIONS if inside else Path(folder) / EVALUATIONS


def part_folder(folder: Path, name: str) -> Path:
    """The folder of a pipeline's component; diffusers' earliest pipelines have no subfolders."""
    return folder / name if (folder / name).is_dir() else folder


def is_scheduler(class_name: str) -> bool:
    """Whether a component is a scheduler, by its class name; all other components of image pipelines have weights."""
    return class_name.endswith("Scheduler")


def weights_files(folder: Path) -> list[Path]:
    """The weights files of a pipeline folder's models, or their shards.

    Raises InputError: a model's weights are missing or not safetensors.
    """
    models = [name for name, (_, kind) in components(read_index(folder)).items() if not is_scheduler(kind)]
    return [file for name in sorted(models) for file in model_files(part_folder(folder, name))]


def weights_hash(folder: str | Path) -> str:
    """A hash of a pipeline folder's weights: the sha256 of the file, or of the hashes of several files.

    Raises InputError: see `weights_files`.
    """
    folder = Path(folder)
    files = weights_files(folder)
    if len(files) == 1:
        return sha256_of_file(files[0])
    lines = [f"{sha256_of_file(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def model_hash(folder: str | Path) -> str:
    """A hash of what a pipeline does with its weights: sha256 over its class and the configs of its components.

    The scheduler's config is included, since it defines the noise process, also for samplers that replace it. So is the
    prediction type of a flow.

    Raises:
        InputError: a config that can't be read.
    """
    folder = Path(folder)
    index = read_index(folder)
    configs = {
        name: read_config(
            part_folder(folder, name) / ("scheduler_config.json" if is_scheduler(kind) else "config.json")
        )
        for name, (_, kind) in components(index).items()
    }
    own = [index["prediction_type"]] if index.get("prediction_type") else []
    return sha256_of_json([class_name(index), configs, *own])


def check_weights(folder: Path) -> None:
    """Raises InputError unless all of a pipeline folder's weights are present, intact, and safetensors."""
    for file in weights_files(folder):
        stored_shapes(file)


def read_config(file: Path) -> dict[str, Any]:
    """A component's config without the INCIDENTAL keys. Raises InputError if it can't be read."""
    try:
        return {name: value for name, value in read_json_object(file).items() if name not in INCIDENTAL}
    except (OSError, Unreadable) as error:
        raise InputError(f"{file} can't be read as a model's config ({error})") from None


def model_files(model: Path) -> list[Path]:
    """The weights files of a model's folder, or their shards. Raises InputError, see `weights_files`."""
    if (model / SHARDS).is_file():  # like diffusers, prefer it to a single file
        try:
            shards = set(read_json_object(model / SHARDS)["weight_map"].values())
            if any(Path(name).name != name or not name.endswith(".safetensors") for name in shards):
                raise ValueError
            files = [model / name for name in sorted(shards)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{model / SHARDS} must be an index of safetensors files beside it") from None
    else:
        files = [model / WEIGHTS]
    for file in files:
        if not file.is_file():
            pickles = sorted(other.name for other in model.glob("*") if other.suffix in PICKLES)
            instead = f"; {pickles[0]} beside it is a pickle, which is never read" if pickles else ""
            raise InputError(f"weights must be safetensors: {file} is missing{instead}")
    return files


def read_training(folder: str | Path) -> dict[str, Any] | None:
    """The training.json of a pipeline folder; None if there is none, as for converted weights.

    Raises InputError: the file is truncated or was not written by a run.
    """
    path = Path(folder) / TRAINING_FILE
    if not path.is_file():
        return None
    training = read_record(path, NEEDED)
    optional: dict[str, Any] = {}
    if training["recipe"]["model"].get("backbone", "uvit") == "uvit":
        optional |= NEEDED_OF_UVIT
    if training.get("init_from"):
        optional |= STARTED_FROM
    if "randomness" in training:
        optional["randomness"] = int
    if "average" in training:
        optional["average"] = dict
    if training["data"].get("class_names"):
        optional["data.class_names"] = list
    return read_record(path, optional)


def average_of(training: dict[str, Any]) -> str | None:
    """The average that the weights are according to training.json, as "width 0.05"; None for the run's own."""
    average = training.get("average", {})
    return next((f"{key} {average[key]}" for key in ("width", "decay") if key in average), None)


def read_record(path: Path, needed: dict[str, Any]) -> dict[str, Any]:
    """Reads a JSON object and checks that it has these (dotted) keys and types.

    Raises InputError: the file is truncated, or a key is missing or of another type.
    """
    try:
        read = read_json_object(path)
        for name, kind in needed.items():
            value: Any = read
            for key in name.split("."):
                value = value[key]
            if not isinstance(value, kind):
                raise ValueError
        return read
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is truncated or corrupted; remove it, or make the pipeline again") from None
