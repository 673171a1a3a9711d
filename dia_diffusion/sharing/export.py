"""Exports a pipeline folder for others: complete, without local paths, and optionally with the code that loads it."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath
from typing import Any

from dia_diffusion.errors import InputError
from dia_diffusion.io import atomic_dir, refuse_existing, verify_checksum, with_checksum, write_json, write_text
from dia_diffusion.models.attached import AttachedModel
from dia_diffusion.models.factory import build_on_meta, check_layers
from dia_diffusion.models.uvit import UViT
from dia_diffusion.pipelines.folder import (
    CONVERTED_FILE,
    EVALUATIONS,
    INDEX,
    PICKLES,
    SHARDS,
    TRAINING_FILE,
    WEIGHTS,
    class_name,
    read_training,
    records_file,
    weights_hash,
)
from dia_diffusion.reading import (
    LINES_LIMIT,
    Unreadable,
    parse_json,
    read_json_object,
    read_lines,
    read_text,
    stored_shapes,
)
from dia_diffusion.sharing.card import evaluation_rows, write_card
from dia_diffusion.sharing.code import HEADER, PIPELINE, with_classes

COMPONENTS = ("unet", "scheduler")
# Files that are shared, at the top of the folder and in its components, in addition to generated code.
SHARED = (INDEX, TRAINING_FILE, CONVERTED_FILE, EVALUATIONS, "*.md", "*.png")
SHARED_OF_COMPONENTS = ("config.json", "scheduler_config.json", WEIGHTS)
NEEDED = (Path(INDEX), Path("unet", "config.json"), Path("unet", WEIGHTS), Path("scheduler", "scheduler_config.json"))
NOT_COPIED = (Path("README.md"), Path(INDEX), Path(EVALUATIONS))  # but regenerated
UNREAD = (*PICKLES, ".pkl", ".pickle", ".npy", ".npz")
PATH_OF_ORIGIN = "_name_or_path"  # diffusers' key for the folder that a component was loaded from
# A local path in a card's YAML.
KEY_WITH_PATH = re.compile(r"""^\s*[\w.]+:\s+['"]?((?:hf:)?(?:/|~|[A-Za-z]:\\)[^\s'"]+)""", re.MULTILINE)


def export_pipeline(source: str | Path, out: str | Path, with_code: bool = True) -> dict[Path, str]:
    """Copies a UViTPipeline's folder with its evaluations, and regenerates its card.

    With code, `DiffusionPipeline.from_pretrained(out, trust_remote_code=True)` loads it without this package installed.
    Code in the source folder is never copied. Absolute paths in JSON files are reduced to their last part.

    Args:
        source: the pipeline folder; if it is in a run, the run's evaluations of these weights are included.
        out: a path that doesn't exist yet.
        with_code: whether the copy contains generated code.

    Returns:
        Paths in the source, relative to it, that are not copied -> why.

    Raises:
        InputError: out exists; the source is not a complete UViTPipeline (`check_pipeline`) or has classes that can't
            be exported (`with_classes`); or its training.json or evaluations are truncated.
    """
    source, out = Path(source), Path(out)
    refuse_existing(out)
    index, code = with_classes(source, without_local_paths(check_pipeline(source)), with_code)
    shared, left_out = shared_files(source)
    records = _evaluations(source)
    read_training(source)  # so that an error names the source
    with atomic_dir(out, replace=False) as temporary:
        for relative in shared:
            if relative not in NOT_COPIED and relative.suffix != ".py":
                (temporary / relative).parent.mkdir(exist_ok=True)
                _copy(source / relative, temporary / relative)
        for relative, text in code.items():
            write_text(temporary / relative, text)
        write_json(temporary / INDEX, index)
        if records:
            write_text(temporary / EVALUATIONS, "".join(json.dumps(with_checksum(record)) + "\n" for record in records))
        write_card(temporary, evaluation_rows(records))
    return left_out


def check_pipeline(folder: str | Path) -> dict[str, Any]:
    """The model_index.json of a folder with a complete UViTPipeline, with or without its own code.

    Reads only the headers of weights, and executes nothing.

    Raises:
        InputError: not a pipeline folder, a pipeline of another class, a file that is missing or a symbolic link, or
            weights that are truncated or from another model.
    """
    folder = Path(folder)
    index = _read_object(folder / INDEX)
    if class_name(index) != PIPELINE:
        raise InputError(f"the pipeline in {folder} must be a {PIPELINE}, got a {class_name(index)}")
    unet = folder / "unet"
    config = _read_object(unet / "config.json")
    weights = unet / WEIGHTS
    if weights.is_symlink() or not weights.is_file() or (unet / SHARDS).exists():  # diffusers prefers shards
        raise InputError(f"weights must be safetensors in one file: {weights} is missing, a link or in shards")
    stored = stored_shapes(weights)
    kind = AttachedModel if config.get("_class_name") == AttachedModel.__name__ else UViT
    try:
        check_layers(config, len(stored))
        model = build_on_meta(lambda: kind.from_config(config))
    except InputError as error:
        raise InputError(f"{unet / 'config.json'} is not a {kind.__name__}'s: {error}") from None
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | stored.keys()):
        if expected.get(name) != stored.get(name):
            raise InputError(f"{unet} holds weights of another model: they differ in tensor {name}")
    if missing := [path for path in NEEDED if path not in shared_files(folder)[0]]:
        raise InputError(
            f"{folder} must be a complete pipeline: {missing[0]} is missing, or it or its folder is a link"
        )
    return index


def _read_object(path: Path) -> dict[str, Any]:
    if path.is_symlink() or not path.is_file():
        raise InputError(f"{path} is missing or a link; a pipeline folder must have it")
    try:
        return read_json_object(path)
    except Unreadable as error:
        raise InputError(f"{path} is truncated or corrupted: {error}") from None


def shared_files(folder: str | Path) -> tuple[list[Path], dict[Path, str]]:
    """The files of a pipeline folder that are shared, and those that are not, with the reason.

    Returns:
        (sorted paths relative to the folder; other files and whole folders -> reason).
    """
    shared, left_out = [], {}
    for place, folders, files in os.walk(folder):
        for name in list(folders) + files:
            path = Path(place, name)
            relative, is_folder = path.relative_to(folder), name in folders
            reason = _reason_against(path, relative, is_folder)
            if reason is not None:
                left_out[relative] = reason
                if is_folder:
                    folders.remove(name)  # don't descend
            elif not is_folder:
                shared.append(relative)
    return sorted(shared), dict(sorted(left_out.items()))


def _reason_against(path: Path, relative: Path, is_folder: bool) -> str | None:
    if path.is_symlink():
        return "a link"
    if relative.name.startswith("."):
        return "a dotfile"
    if is_folder:
        return None if str(relative) in COMPONENTS else "not a component of the pipeline"
    if not path.is_file():
        return "not a file"
    if relative.suffix in UNREAD:
        return "may hold a pickle"
    if relative.suffix == ".py":
        with path.open("rb") as file:
            return None if file.read(len(HEADER)) == HEADER.encode() else "code that export has not generated"
    patterns = SHARED if len(relative.parts) == 1 else SHARED_OF_COMPONENTS
    return None if any(fnmatch(relative.name, pattern) for pattern in patterns) else "not part of a pipeline"


def without_local_paths(value: Any) -> Any:
    """JSON with absolute paths reduced to their last part, and without diffusers' record of the source folder."""
    if isinstance(value, dict):
        return {key: without_local_paths(item) for key, item in value.items() if key != PATH_OF_ORIGIN}
    if isinstance(value, list):
        return [without_local_paths(item) for item in value]
    return PureWindowsPath(value).name if isinstance(value, str) and _is_local_path(value) else value


def find_local_path(path: Path) -> str | None:
    """A local path in a JSON, JSON-lines or Markdown file; None if there is none.

    Raises:
        InputError: the content doesn't match the file's suffix.
    """
    if path.suffix not in (".json", ".jsonl", ".md"):
        return None
    try:
        text = read_text(path, LINES_LIMIT)
        if path.suffix == ".md":
            match = KEY_WITH_PATH.search(text)
            return match and match[1]
        values = [parse_json(line) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]
    except Unreadable:
        raise _corrupted(path) from None
    return next((string for string in _strings(values) if _is_local_path(string)), None)


def _is_local_path(text: str) -> bool:
    text = text.removeprefix("hf:")  # data.source may name a folder after it
    return text.startswith(("/", "~", "file:")) or PureWindowsPath(text).drive != ""


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _corrupted(path: Path) -> InputError:
    return InputError(f"{path} is truncated or corrupted; remove it, or make the pipeline again")


def _copy(file: Path, place: Path) -> None:
    """Copies a file; removes local paths from JSON."""
    if file.suffix == ".json":
        try:
            value = parse_json(read_text(file))
        except Unreadable:
            raise _corrupted(file) from None
        if (cleaned := without_local_paths(value)) != value:
            write_json(place, cleaned)
            return
    shutil.copyfile(file, place)


def _evaluations(source: Path) -> list[dict[str, Any]]:
    """The records of the source's weights, from its run or from the folder itself."""
    file, own = records_file(source), weights_hash(source)
    try:
        lines = read_lines(file) if file.is_file() else []
    except Unreadable as error:
        raise InputError(f"{file} can't be read as evaluation records ({error})") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = verify_checksum(parse_json(line))
            cleaned = without_local_paths(record)
            # A protocol must match its hash, so paths in it can't be shortened; such records are left out.
            if record["weights_hash"] == own and cleaned["protocol"] == record["protocol"]:
                evaluation_rows([cleaned])
                records.append(cleaned)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise InputError(f"{file}, line {number}: not a complete evaluation record; remove that line") from None
    return records
