"""Checkpoints that were cut short or had a bit flipped: found and named, and the one before is used."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from dia_diffusion.cli.main import main
from dia_diffusion.errors import InputError
from dia_diffusion.io import step_folders, write_json
from dia_diffusion.training.checkpoint import (
    check_checkpoint,
    load_checkpoint,
    newest_state,
    read_state,
    save_checkpoint,
    whole_checkpoint,
)
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.trainer import Trainer
from tests.faults.damage import cuts, flip_one, flips
from tests.processes import start_connected
from tests.training import classify
from tests.training.conftest import Recorder
from tests.training.run_files import assert_same_run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def test_every_cut_and_flip_of_a_checkpoint_is_found(run: Path) -> None:
    place = run / "checkpoints" / "step-00000006"
    files = sorted(place.iterdir())
    assert [file.name for file in files] == [
        "ema.safetensors",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    for file in files:
        content = file.read_bytes()
        damaged = [*cuts(file), *(flips(content, 20) if file.suffix == ".safetensors" else ())]
        if file.name == "state.json":  # whose last byte ends a line
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
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000004.damaged",
        "step-00000006",
        "step-00000006.damaged",
    ]


def test_processes_agree_on_the_checkpoint_that_is_used(run: Path, recipe: Path, tmp_path: Path) -> None:
    """Of which only the main one renames and tells."""
    flip_one(run / "checkpoints" / "step-00000006" / "model.safetensors")
    command = ["train", "--config", recipe, "--output", run, "--train.checkpoint_every", 2]
    both = start_connected(*command, logs=tmp_path)
    assert [process.wait() for process in both] == [0, 0]
    assert "step-00000006.damaged" in both[0].text() and "resuming from step 4" in both[0].text()
    # Some versions of torch tell here that gloo has connected.
    assert not [line for line in both[1].text().splitlines() if not line.startswith("[Gloo]")]
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-2:] == [
        "step-00000006",
        "step-00000006.damaged",
    ]


def test_what_is_told_of_a_damaged_checkpoint(run: Path, recipe: Path) -> None:
    place = run / "checkpoints" / "step-00000006"
    flip_one(place / "ema.safetensors")
    (run / "checkpoints" / "step-00000006.damaged").mkdir()  # of an earlier time
    with pytest.raises(InputError, match="seed: 0 -> 1"):
        Trainer(read_experiment(str(recipe), ["--output", str(run), "--seed", "1"]), Recorder())
    assert place.is_dir(), "what is refused changes nothing"
    reporter = Recorder()
    Trainer(read_experiment(str(recipe), ["--output", str(run)]), reporter).run()
    assert reporter.messages[0] == (
        f"warning: checkpoint file {place}/ema.safetensors is truncated or corrupted (its sha256 differs); "
        "renamed to step-00000006.damaged-2, and the checkpoint before it is used"
    )


def test_a_classifier_goes_on_from_the_checkpoint_before(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "classifier", tmp_path / "classifier")
    flip_one(tmp_path / "classifier" / "checkpoints" / "step-00000006" / "optimizer.safetensors")
    classify.train(classify.tiny(tmp_path, "classifier", "--train.checkpoint_every", "2"))
    assert_same_run(tmp_path / "classifier", trained / "classifier")


def test_without_a_whole_checkpoint_nothing_is_touched(run: Path, recipe: Path) -> None:
    for place in step_folders(run / "checkpoints").values():
        flip_one(place / "model.safetensors")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != ".lock"}
    with pytest.raises(InputError, match=r"step-00000006/model.safetensors .*no checkpoint in .* is whole"):
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
    """As of before it had one."""
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

    (folder / "step-00000099").mkdir()  # as of a copy that was broken off
    save_checkpoint(folder, 8, content, keep_last=1)
    assert list(step_folders(folder)) == [8, 99]
    assert whole_checkpoint(folder) == (
        folder / "step-00000008",
        {
            folder
            / "step-00000099": f"checkpoint file {folder}/step-00000099/state.json is missing, truncated or corrupted"
        },
    )
