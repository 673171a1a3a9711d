"""Records and statistics that were cut short or had a bit flipped: found and named, never silently wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dia_diffusion.data import open_images
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import build_features
from dia_diffusion.evaluation.record import append_record, read_records
from dia_diffusion.evaluation.reference import read_statistics, reference_statistics, write_statistics
from dia_diffusion.io import with_checksum, write_json
from dia_diffusion.sweeps.accuracies import read_result
from dia_diffusion.sweeps.trials import RESULT_FILE as TRIAL
from dia_diffusion.sweeps.trials import base_recipe, finished, make_trial
from dia_diffusion.training.checkpoint import read_state
from dia_diffusion.training.run_folder import read_metrics
from tests.faults.damage import cuts, flips

FLIPS = 100


def assert_found(file: Path, read: Callable[[], Any], count: int | None) -> int:
    """Whatever bit is flipped, it is refused by the file's name, or what is read is what was written; how many were."""
    whole, content, found = read(), file.read_bytes(), 0
    for text in flips(content, count):
        file.write_bytes(text)
        try:
            assert read() == whole, text
        except InputError as error:
            assert file.name in str(error)
            found += 1
    file.write_bytes(content)
    assert found
    return found


@pytest.fixture
def records(
    trained: Path, recipe: Path, tmp_path: Path, record: Callable[..., Any]
) -> list[tuple[Path, Callable[[], Any]]]:
    """A file of each kind of record, with what reads it."""
    folder = Path(shutil.copytree(trained, tmp_path / "all"))
    state = folder / "run" / "checkpoints" / "step-00000006"
    metrics, evaluations = folder / "run" / "metrics.jsonl", folder / "evaluations.jsonl"
    for step in (100, 200):
        append_record(evaluations, record(3.25, step=step))
    statistics, extractor = folder / "statistics.safetensors", build_features("digits")
    write_statistics(statistics, reference_statistics(open_images("digits"), extractor, count=100), extractor)
    trial = make_trial("trial", {}, folder, base_recipe("trial", str(recipe), {}), seed=0)
    write_json(trial.folder / TRIAL, with_checksum({"recipe": trial.experiment.to_dict(), "held_out_loss": 0.5}))
    last = read_metrics(metrics)[-1]

    def lines() -> Any:
        read = read_metrics(metrics)
        # Without its end the last line is one that a crash has cut short, and is left out.
        return read if metrics.read_bytes().endswith(b"\n") else [*read, last]

    def moments() -> Any:
        read = read_statistics(statistics)
        return read.statistics.mean.tobytes(), read.statistics.covariance.tobytes(), read.provenance

    return [
        (state / "state.json", lambda: read_state(state)),
        (metrics, lines),
        (evaluations, lambda: read_records(evaluations)),
        (folder / "classifier" / "result.json", lambda: read_result(folder / "classifier")),
        (trial.folder / TRIAL, lambda: finished(trial)),
        (statistics, moments),
    ]


def test_flipped_bits_of_records_are_found(records: list[tuple[Path, Callable[[], Any]]]) -> None:
    for file, read in records:
        found = assert_found(file, read, FLIPS)
        print(f"{file.name}: {found} of {FLIPS} flips were refused, the others changed nothing that is read")


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_each_bit_of_records(records: list[tuple[Path, Callable[[], Any]]]) -> None:
    for file, read in records:
        every = None if file.suffix != ".safetensors" else 20_000
        found = assert_found(file, read, every)
        print(f"{file.name}: {found} of {every or 8 * file.stat().st_size} flips were refused")


def test_cut_records_and_statistics_are_named(records: list[tuple[Path, Callable[[], Any]]]) -> None:
    for file, read in records:
        content, whole = file.read_bytes(), read()
        for text in cuts(file):
            if file.suffix == ".jsonl" and (text == b"" or text.endswith(b"\n")):
                continue  # a shorter file, and whole
            file.write_bytes(text)
            if file.name == "metrics.jsonl":
                assert read_metrics(file) == whole[: text.count(b"\n")]
            elif text.strip() == content.strip():  # but for the end of the last line
                assert read() == whole
            else:
                with pytest.raises(InputError, match=file.name):
                    read()
        file.write_bytes(content)


def test_metrics_without_checksums_are_read(trained: Path, tmp_path: Path) -> None:
    """As of before there were any."""
    lines = read_metrics(trained / "run" / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(tmp_path / "metrics.jsonl") == lines
