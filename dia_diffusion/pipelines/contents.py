"""What a UViTPipeline's folder holds: whether it is whole, which of its files are for others, and paths in its text."""

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath
from typing import Any

from dia_diffusion.errors import InputError
from dia_diffusion.models.attached import AttachedModel
from dia_diffusion.models.factory import build_on_meta, check_layers
from dia_diffusion.models.uvit import UViT
from dia_diffusion.pipelines.bundle import HEADER
from dia_diffusion.pipelines.card import CONVERTED_FILE, TRAINING_FILE
from dia_diffusion.pipelines.folder import EVALUATIONS, INDEX, SHARDS, WEIGHTS, class_name
from dia_diffusion.pipelines.folder import PICKLES as PICKLED_WEIGHTS
from dia_diffusion.reading import LINES_LIMIT, Unreadable, parse_json, read_json_object, read_text, stored_shapes

COMPONENTS = ("unet", "scheduler")
# What is for others, at the top of the folder and in its components; generated code besides.
SHARED = (INDEX, TRAINING_FILE, CONVERTED_FILE, EVALUATIONS, "*.md", "*.png")
NEEDED = (Path(INDEX), Path("unet", "config.json"), Path("unet", WEIGHTS), Path("scheduler", "scheduler_config.json"))
SHARED_OF_COMPONENTS = ("config.json", "scheduler_config.json", WEIGHTS)
PICKLES = (*PICKLED_WEIGHTS, ".pkl", ".pickle", ".npy", ".npz")
PATH_OF_ORIGIN = "_name_or_path"  # where diffusers notes the folder that a component was loaded from
# In a card's YAML.
KEY_WITH_PATH = re.compile(r"""^\s*[\w.]+:\s+['"]?((?:hf:)?(?:/|~|[A-Za-z]:\\)[^\s'"]+)""", re.MULTILINE)


def check_pipeline(folder: str | Path) -> dict[str, Any]:
    """Sees that a folder holds a whole UViTPipeline, with code of its own or without.

    Reads no more than the headers of weights, and runs nothing.

    Returns:
        Its model_index.json.

    Raises:
        InputError: no pipeline folder, a pipeline of another class, a file that is missing or reached through a link,
            or weights that are cut short or of another model.
    """
    folder = Path(folder)
    index = read_part(folder / INDEX)
    if class_name(index) != "UViTPipeline":
        raise InputError(f"{folder} holds a {class_name(index)}; accepted: a UViTPipeline")
    config = read_part(folder / "unet" / "config.json")
    kind = AttachedModel if config.get("_class_name") == AttachedModel.__name__ else UViT
    stored = _weights_shapes(folder / "unet")
    try:
        check_layers(config, len(stored))
        model = build_on_meta(lambda: kind.from_config(config))
    except InputError as error:
        raise InputError(f"{folder / 'unet' / 'config.json'} is not a {kind.__name__}'s: {error}") from None
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | stored.keys()):
        if expected.get(name) != stored.get(name):
            raise InputError(f"{folder / 'unet'} holds weights of another model: they differ in tensor {name}")
    if missing := [path for path in NEEDED if path not in shared_files(folder)[0]]:
        raise InputError(f"{folder / missing[0]} is missing, or it or its folder is a link; accepted: a whole pipeline")
    return index


def read_part(path: Path) -> dict[str, Any]:
    """A JSON object from a file that a pipeline folder needs.

    Raises:
        InputError: there is none, it is a link, cut short or something else.
    """
    if path.is_symlink() or not path.is_file():
        raise InputError(f"{path} is missing or a link; accepted: the folder of a pipeline")
    try:
        return read_json_object(path)
    except Unreadable as error:
        raise InputError(f"{path} is cut short or altered: {error}") from None


def shared_files(folder: str | Path) -> tuple[list[Path], dict[Path, str]]:
    """The files of a pipeline folder that are for others, and what else lies there with the reason why it isn't.

    Returns:
        (paths relative to the folder, sorted; other files and whole folders -> reason).
    """
    folder = Path(folder)
    shared, left_out = [], {}
    for path, reason in _walk(folder):
        if reason is None:
            shared.append(path.relative_to(folder))
        else:
            left_out[path.relative_to(folder)] = reason
    return sorted(shared), dict(sorted(left_out.items()))


def without_local_paths(value: Any) -> Any:
    """JSON with absolute paths reduced to their last part, and without diffusers' notes where it was loaded from."""
    if isinstance(value, dict):
        return {key: without_local_paths(item) for key, item in value.items() if key != PATH_OF_ORIGIN}
    if isinstance(value, list):
        return [without_local_paths(item) for item in value]
    return PureWindowsPath(value).name if isinstance(value, str) and _is_local_path(value) else value


def find_local_path(path: Path) -> str | None:
    """A path of this machine that a JSON, JSON-lines or Markdown file names; None where there is none.

    Raises:
        InputError: text that isn't what the file's name says.
    """
    if path.suffix not in (".json", ".jsonl", ".md"):
        return None
    try:
        text = read_text(path, LINES_LIMIT)
        if path.suffix == ".md":
            found = KEY_WITH_PATH.search(text)
            return None if found is None else found[1]
        values = [parse_json(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [parse_json(text)]
    except Unreadable:
        raise InputError(f"{path} is cut short or altered; remove it, or make the pipeline again") from None
    return next((string for string in _strings(values) if _is_local_path(string)), None)


def _walk(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Files and folders, each with the reason why it isn't for others; not what lies in folders that aren't."""
    for place, folders, files in os.walk(folder):
        entries = [(Path(place, name), name in folders) for name in folders + files]
        reasons = {path: _reason_against(path, path.relative_to(folder), is_folder) for path, is_folder in entries}
        folders[:] = [name for name in folders if reasons[Path(place, name)] is None]
        yield from ((path, reasons[path]) for path, is_folder in entries if reasons[path] or not is_folder)


def _reason_against(path: Path, relative: Path, is_folder: bool) -> str | None:
    if path.is_symlink():
        return "a link"
    if relative.name.startswith("."):
        return "a dotfile"
    if is_folder:
        return None if str(relative) in COMPONENTS else "not a component of the pipeline"
    if not path.is_file():
        return "not a file"
    if relative.suffix in PICKLES:
        return "may hold a pickle"
    if relative.suffix == ".py":
        with path.open("rb") as file:
            generated = file.read(len(HEADER)) == HEADER.encode()
        return None if generated else "code that export has not generated"
    patterns = SHARED if len(relative.parts) == 1 else SHARED_OF_COMPONENTS
    return None if any(fnmatch(relative.name, pattern) for pattern in patterns) else "not part of a pipeline"


def _weights_shapes(unet: Path) -> dict[str, tuple[int, ...]]:
    file = unet / WEIGHTS
    # diffusers would prefer shards to a single file beside them.
    if file.is_symlink() or not file.is_file() or (unet / SHARDS).exists():
        raise InputError(f"{file} is missing, a link or in shards; accepted: weights as safetensors, in one file")
    return stored_shapes(file)


def _is_local_path(text: str) -> bool:
    text = text.removeprefix("hf:")  # of data.source, which may be a folder
    return text.startswith(("/", "~", "file:")) or PureWindowsPath(text).drive != ""


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
