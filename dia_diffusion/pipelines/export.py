"""A pipeline folder for others: whole, without paths of this machine, and on demand with the code that loads it."""

import json
import shutil
from pathlib import Path
from typing import Any

from dia_diffusion.errors import InputError
from dia_diffusion.io import atomic_dir, refuse_existing, verify_checksum, with_checksum, write_json, write_text
from dia_diffusion.pipelines.bundle import PACKAGE, bundle
from dia_diffusion.pipelines.card import evaluation_rows, read_training, write_card
from dia_diffusion.pipelines.contents import (
    check_pipeline,
    shared_files,
    without_local_paths,
)
from dia_diffusion.pipelines.folder import EVALUATIONS, INDEX, records_file, weights_hash
from dia_diffusion.reading import Unreadable, parse_json, read_json, read_lines

WRITTEN_ANEW = (Path("README.md"), Path(INDEX), Path(EVALUATIONS))
# diffusers copies code files into one folder by name, so no other project's may be called the same.
PIPELINE_CODE = f"pipeline_{PACKAGE}"
# The networks, and the module of each.
MODEL_MODULES = {"UViT": "models.uvit", "AttachedModel": "models.attached"}
# Schedulers of the package's own, and the module of each; diffusers has the others.
SCHEDULER_MODULES = {"EulerMaruyamaScheduler": "sampling.euler_maruyama"}


def export_pipeline(source: str | Path, out: str | Path, with_code: bool = True) -> dict[Path, str]:
    """Copies a UViTPipeline's folder, its evaluations included, and writes its card anew.

    With code, `DiffusionPipeline.from_pretrained(out, trust_remote_code=True)` loads it where this package isn't
    installed. Code that lies in the source is never copied. Absolute paths in its JSON are reduced to their last part.

    Args:
        source: the pipeline folder; of a run's, the run's evaluations of these weights come along.
        out: a path where there is nothing yet.
        with_code: whether the copy carries generated code.

    Returns:
        What lies in the source and is not copied -> why, with paths relative to it.

    Raises:
        InputError: out exists; the source is no whole UViTPipeline (`check_pipeline`), or has a scheduler that is
            neither diffusers' nor this package's; or its training.json or evaluations are cut short.
    """
    source, out = Path(source), Path(out)
    refuse_existing(out)
    index, code = index_and_code(source, without_local_paths(check_pipeline(source)), with_code)
    shared, left_out = shared_files(source)
    records = _evaluations(source)
    read_training(source)  # whose error should name the source
    with atomic_dir(out, replace=False) as temporary:
        for relative in shared:
            if relative in WRITTEN_ANEW or relative.suffix == ".py":
                continue
            (temporary / relative).parent.mkdir(exist_ok=True)
            _copy(source / relative, temporary / relative)
        for relative, text in code.items():
            write_text(temporary / relative, text)
        write_json(temporary / INDEX, index)
        if records:
            write_text(temporary / EVALUATIONS, "".join(json.dumps(with_checksum(record)) + "\n" for record in records))
        write_card(temporary, evaluation_rows(records))
    return left_out


def index_and_code(source: Path, index: dict[str, Any], with_code: bool) -> tuple[dict[str, Any], dict[Path, str]]:
    """What the index of a pipeline folder says of its classes, and the code files beside it by path.

    Args:
        source: the folder, for errors.
        index: its index, whatever code that names.
        with_code: whether the index names generated code, as diffusers finds it, or installed classes.

    Raises:
        InputError: a scheduler that is neither diffusers' nor this package's.
    """
    scheduler = index.get("scheduler")
    if not isinstance(scheduler, list) or len(scheduler) != 2:
        raise InputError(f"{source / INDEX} names no scheduler; accepted: the folder of a UViTPipeline")
    library, name = map(str, scheduler)
    network = str(index["unet"][-1])
    if network not in MODEL_MODULES:
        raise InputError(f"{source} has a {network} as its unet; accepted: {', '.join(MODEL_MODULES)}")
    modules = {"UViTPipeline": "pipelines.pipeline_uvit", network: MODEL_MODULES[network]}
    files = {
        "UViTPipeline": Path(PIPELINE_CODE),
        network: Path("unet", f"{PACKAGE}_{modules[network].rpartition('.')[2]}"),
    }
    if library != "diffusers":
        if name not in SCHEDULER_MODULES:
            known = ", ".join(SCHEDULER_MODULES)
            raise InputError(f"{source} has scheduler {name} of {library}; accepted: diffusers' own, and {known}")
        modules[name] = SCHEDULER_MODULES[name]
        files[name] = Path("scheduler", f"{PACKAGE}_{modules[name].rpartition('.')[2]}")
    modules = {kind: f"{PACKAGE}.{module}" for kind, module in modules.items()}
    places = {kind: file.name for kind, file in files.items()} if with_code else modules
    index = {
        **index,
        "_class_name": [places["UViTPipeline"], "UViTPipeline"] if with_code else "UViTPipeline",
        "scheduler": [places.get(name, "diffusers"), name],
        "unet": [places[network], network],
    }
    code = {file.with_suffix(".py"): bundle(modules[kind], kind) for kind, file in files.items()} if with_code else {}
    return index, code


def _copy(file: Path, place: Path) -> None:
    """Copies a file, JSON without paths of this machine."""
    if file.suffix == ".json":
        try:
            value = read_json(file)
        except Unreadable:
            raise InputError(f"{file} is cut short or altered; remove it, or make the pipeline again") from None
        if (cleaned := without_local_paths(value)) != value:
            write_json(place, cleaned)
            return
    shutil.copyfile(file, place)


def _evaluations(source: Path) -> list[dict[str, Any]]:
    """The records of the source's weights, which lie in its run or in the folder itself."""
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
            # A protocol is bound to its hash: one that names a path can't be shortened, and stays here.
            if record["weights_hash"] == own and cleaned["protocol"] == record["protocol"]:
                evaluation_rows([cleaned])
                records.append(cleaned)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise InputError(f"{file}, line {number}: not a whole evaluation record, remove that line") from None
    return records
