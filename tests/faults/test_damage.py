"""Truncated or bit-flipped checkpoints, records and statistics are found and named, never misread."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from dia_diffusion.cli.main import main
from dia_diffusion.data import open_images
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import build_features
from dia_diffusion.evaluation.record import append_record, read_records
from dia_diffusion.evaluation.reference import reference_statistics
from dia_diffusion.evaluation.statistics_file import read_statistics, write_statistics
from dia_diffusion.io import step_folders, with_checksum, write_json
from dia_diffusion.sweeps.accuracies import read_result
from dia_diffusion.sweeps.outcome import RESULT_FILE as TRIAL
from dia_diffusion.sweeps.outcome import finished
from dia_diffusion.sweeps.trials import base_recipe, make_trial
from dia_diffusion.training.checkpoint import (
    check_checkpoint,
    load_checkpoint,
    newest_intact_checkpoint,
    newest_state,
    read_state,
    save_checkpoint,
)
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.run_folder import read_metrics
from dia_diffusion.training.trainer import Trainer
from tests.processes import start_connected
from tests.training import classify
from tests.training.conftest import Recorder
from tests.training.run_files import assert_same_run


def cuts(file: Path) -> Iterator[bytes]:
    """The file's content truncated at each kind of position."""
    content = file.read_bytes()
    header = int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else len(content) // 2
    for length in (0, 1, 4, 8, 8 + header // 2, 8 + header, (8 + header + len(content)) // 2, len(content) - 1):
        if length < len(content):
            yield content[:length]


def flips(content: bytes, count: int | None, seed: int = 0) -> Iterator[bytes]:
    """The content with one bit flipped: for each bit, or for `count` random ones."""
    bits: Any = range(8 * len(content))
    for bit in bits if count is None else random.Random(seed).sample(bits, min(count, len(bits))):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def flip_one(file: Path) -> None:
    """Flips one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def test_every_cut_and_flip_of_a_checkpoint_is_found(run: Path) -> None:
    place = run / "checkpoints" / "step-00000006"
    files = sorted(place.iterdir())
    names = ["ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert [file.name for file in files] == names
    for file in files:
        content = file.read_bytes()
        damaged = [*cuts(file), *(flips(content, 20) if file.suffix == ".safetensors" else ())]
        if file.name == "state.json":  # its last byte is a newline
            damaged = [text for text in damaged if text.strip() != content.strip()]
        for text in damaged:
            file.write_bytes(text)
            with pytest.raises(InputError, match=f"checkpoint file .*{file.name}.* truncated or corrupted"):
                check_checkpoint(place)
        file.unlink()
        with pytest.raises(InputError, match=f"{file.name} is missing"):
            check_checkpoint(place)
        file.write_bytes(content)
    check_checkpoint(place)


def test_the_checkpoint_before_a_damaged_one_is_used(run: Path, trained: Path, recipe: Path) -> None:
    flip_one(run / "checkpoints" / "step-00000006" / "state.json")
    flip_one(run / "checkpoints" / "step-00000004" / "ema.safetensors")
    command = ["train", "--config", str(recipe), "--output", str(run), "--train.checkpoint_every", "2"]
    assert main([*command, "--train.keep_last", "1"]) == 0
    assert_same_run(run, trained / "run")
    kept = ["step-00000004.damaged", "step-00000006", "step-00000006.damaged"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == kept


def test_processes_agree_on_the_checkpoint_that_is_used(run: Path, recipe: Path, tmp_path: Path) -> None:
    """Only the main process renames and reports."""
    flip_one(run / "checkpoints" / "step-00000006" / "model.safetensors")
    command = ["train", "--config", recipe, "--output", run, "--train.checkpoint_every", 2]
    both = start_connected(*command, logs=tmp_path)
    assert [process.wait() for process in both] == [0, 0]
    assert "step-00000006.damaged" in both[0].text() and "resuming from step 4" in both[0].text()
    # Some versions of torch print here that gloo has connected.
    assert not [line for line in both[1].text().splitlines() if not line.startswith("[Gloo]")]
    kept = ["step-00000006", "step-00000006.damaged"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-2:] == kept


def test_the_warning_about_a_damaged_checkpoint(run: Path, recipe: Path) -> None:
    place = run / "checkpoints" / "step-00000006"
    flip_one(place / "ema.safetensors")
    (run / "checkpoints" / "step-00000006.damaged").mkdir()  # from an earlier failure
    with pytest.raises(InputError, match="seed: 0 -> 1"):
        Trainer(read_experiment(str(recipe), ["--output", str(run), "--seed", "1"]), Recorder())
    assert place.is_dir(), "what is refused changes nothing"
    reporter = Recorder()
    Trainer(read_experiment(str(recipe), ["--output", str(run)]), reporter).run()
    assert reporter.messages[0] == (
        f"warning: checkpoint file {place}/ema.safetensors is truncated or corrupted (its sha256 differs); "
        "renamed to step-00000006.damaged-2, and the checkpoint before it is used"
    )


def test_a_classifier_resumes_from_the_previous_checkpoint(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "classifier", tmp_path / "classifier")
    flip_one(tmp_path / "classifier" / "checkpoints" / "step-00000006" / "optimizer.safetensors")
    classify.train(classify.tiny(tmp_path, "classifier", "--train.checkpoint_every", "2"))
    assert_same_run(tmp_path / "classifier", trained / "classifier")


def test_without_a_whole_checkpoint_nothing_is_touched(run: Path, recipe: Path) -> None:
    for place in step_folders(run / "checkpoints").values():
        flip_one(place / "model.safetensors")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != ".lock"}
    with pytest.raises(InputError, match=r"step-00000006/model.safetensors .*no checkpoint in .* is intact"):
        Trainer(read_experiment(str(recipe), ["--output", str(run)]), Recorder())
    assert {file: file.read_bytes() for file in before} == before
    assert len(step_folders(run / "checkpoints")) == 3


def test_an_altered_line_of_metrics_is_named_before_it_is_dropped(run: Path, recipe: Path, trained: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join([lines[0], lines[1].replace(b"loss", b"lose"), *lines[2:]]))
    experiment = read_experiment(str(recipe), ["--output", str(run)])
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2 is truncated or corrupted; remove that line"):
        Trainer(experiment, Recorder()).run()
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    Trainer(experiment, Recorder()).run()
    assert_same_run(run, trained / "run")


def test_a_study_sees_the_newest_state_that_can_be_read(run: Path) -> None:
    flip_one(run / "checkpoints" / "step-00000006" / "state.json")
    state = newest_state(run / "checkpoints")
    assert state is not None and state["step"] == 4
    flip_one(run / "checkpoints" / "step-00000004" / "state.json")
    flip_one(run / "checkpoints" / "step-00000002" / "state.json")
    with pytest.raises(InputError, match=r"step-00000006/state.json"):
        newest_state(run / "checkpoints")


def test_a_state_without_a_checksum_is_read(run: Path) -> None:
    """Older states have none."""
    place = run / "checkpoints" / "step-00000006"
    state = read_state(place)
    write_json(place / "state.json", state)
    assert read_state(place) == state


def test_keep_last_never_removes_the_one_that_works(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run / "checkpoints"
    content = load_checkpoint(folder / "step-00000006")
    kept = save_checkpoint(folder, 6, content, keep_last=1)
    assert list(step_folders(folder)) == [6]

    calls: list[object] = []

    def fails(*args: object) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError("Input/output error")
        save_file(*args)

    monkeypatch.setattr("dia_diffusion.training.checkpoint.save_file", fails)
    with pytest.raises(OSError, match="Input/output"):
        save_checkpoint(folder, 7, content, keep_last=1)
    assert list(folder.iterdir()) == [kept]
    monkeypatch.undo()

    (folder / "step-00000099").mkdir()  # as from an interrupted copy
    save_checkpoint(folder, 8, content, keep_last=1)
    assert list(step_folders(folder)) == [8, 99]
    broken = folder / "step-00000099"
    why = f"checkpoint file {broken}/state.json is missing, truncated or corrupted"
    assert newest_intact_checkpoint(folder) == (folder / "step-00000008", {broken: why})


FLIPS = 100


def assert_found(file: Path, read: Callable[[], Any], count: int | None) -> int:
    """Each flip is refused with the file's name or doesn't change what is read; returns the number of refusals."""
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
    """One file of each kind of record, with the function that reads it."""
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
        # A last line without a newline counts as truncated by a crash and is left out.
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
                continue  # a valid file with fewer lines
            file.write_bytes(text)
            if file.name == "metrics.jsonl":
                assert read_metrics(file) == whole[: text.count(b"\n")]
            elif text.strip() == content.strip():  # only the last newline is missing
                assert read() == whole
            else:
                with pytest.raises(InputError, match=file.name):
                    read()
        file.write_bytes(content)


def test_metrics_without_checksums_are_read(trained: Path, tmp_path: Path) -> None:
    """Older metrics have none."""
    lines = read_metrics(trained / "run" / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(tmp_path / "metrics.jsonl") == lines
