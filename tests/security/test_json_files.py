"""Every JSON file that the library reads, replaced by hostile ones: refused in one line or left out, never obeyed."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.frechet import save_tensors
from tests.security.hostile import JSON_FILES, put_json, wrong_values
from tests.security.readers import LENIENT, STRICT, features_finished
from tests.security.watch import Sandbox, check_line

# An empty file means a run that has not been measured yet.
EMPTY_LINES = ("records", "records on a page")


READERS = {**STRICT, **LENIENT}


@pytest.mark.parametrize("name", READERS)
def test_the_files_are_accepted_as_they_were_written(name: str, sandbox: Sandbox) -> None:
    reader = READERS[name](sandbox.folder)
    assert reader.file.is_file()
    assert not isinstance(sandbox.watch(reader.read), InputError)


@pytest.mark.parametrize("kind", JSON_FILES)
@pytest.mark.parametrize("name", STRICT)
def test_hostile_json_is_refused(name: str, kind: str, sandbox: Sandbox) -> None:
    reader = READERS[name](sandbox.folder)
    put_json(reader.file, kind)
    if (kind == "empty" and name in EMPTY_LINES) or (kind in ("pipe", "folder", "device") and name in NOT_THERE):
        sandbox.survived(reader.read)
    else:
        sandbox.refused(reader.read, sandbox.folder)


# These readers do without the file, and treat anything but a regular file as a missing one.
NOT_THERE = (
    "index of shards",
    "training of a pipeline",
    "training on a card",
    "training that is exported",
    "conversion on a card",
    "records on a page",
    "result of a trial",
)


@pytest.mark.parametrize("kind", JSON_FILES)
@pytest.mark.parametrize("name", LENIENT)
def test_hostile_json_does_no_harm(name: str, kind: str, sandbox: Sandbox) -> None:
    reader = READERS[name](sandbox.folder)
    put_json(reader.file, kind)
    sandbox.survived(reader.read)


@pytest.mark.parametrize("name", [name for name in READERS if name != "features that are finished"])  # safetensors
def test_values_of_other_types_are_refused_or_do_nothing(name: str, sandbox: Sandbox) -> None:
    """Each value in turn is missing or has another type; reading the file may then raise nothing but InputError."""
    reader = READERS[name](sandbox.folder)
    original = reader.file.read_text()
    first, *rest = original.splitlines(keepends=True) if reader.file.suffix == ".jsonl" else [original]
    changed = wrong_values(json.loads(first))
    assert len(changed) > 20
    most = 5 if "on a page" in name or "exported" in name else 30  # a random sample: all of them take minutes
    for label, value in random.Random(name).sample([*changed.items()], min(most, len(changed))):
        reader.file.write_text("".join([json.dumps(value) + "\n", *rest]))
        try:
            reader.read()
        except InputError as error:
            check_line(str(error))
        except Exception as error:
            raise AssertionError(f"{label}: {type(error).__name__}: {error}") from error
        shutil.rmtree(sandbox.folder / "out", ignore_errors=True)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "1", *(f'{{"seconds": {v}}}' for v in ("null", "[]", '"x"'))])
def test_a_chunk_of_features_with_another_header_is_measured_again(text: str, tmp_path: Path) -> None:
    reader = features_finished(tmp_path)
    assert reader.read() == ([], 1.0)
    save_tensors(reader.file, {"features": torch.ones(10, 4)}, text)
    assert reader.read() == ([range(10)], 0)


def test_the_readers_are_all_of_the_library() -> None:
    """These tests don't cover modules that read JSON without `dia_diffusion.reading`."""
    package = Path(__file__).parents[2] / "dia_diffusion"
    texts = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")}
    parsing = {name for name, text in texts.items() if "json.load" in text or "yaml.safe_load" in text}
    # These parse what they have just written themselves, or the command line.
    assert parsing == {
        "reading/__init__.py",
        "io.py",
        "distributed.py",
        "sampling/samplers.py",
        "sampling/writers.py",
        "cli/options.py",
    }
