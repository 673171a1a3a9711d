"""Stopped or killed runs resume bit for bit or are refused; the same commands write the same bytes."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from dia_diffusion.cli.main import main
from dia_diffusion.errors import InputError, Stopped
from dia_diffusion.training import run_folder
from dia_diffusion.training.checkpoint import read_state
from dia_diffusion.training.run_folder import RunFolder, check_shared
from dia_diffusion.training.trainer import Trainer
from tests.training.conftest import FLOW, TINY
from tests.training.run_files import assert_same_run, cut_off, make_version_1, metrics
from tests.training.test_backbones import BACKBONES, BY_CLASS

RUNS = {
    "rate of the unit": ("--optimizer.unit_learning_rate", "1e-4", "--model.attention", "block-channels"),
    "flow, dropped branches": (*FLOW, "--model.drop_path", "0.5"),
    "Muon, recomputed": ("--optimizer.name", "muon", "--train.gradient_checkpointing", "true"),
    "classes, SSIA": (*BY_CLASS, "--ssia.weight", "0.5"),
    "UNet, SSIA": (*BACKBONES["unet2d"], *BY_CLASS, "--model.attention", "srm", "--ssia.weight", "0.5"),
    "DiT": (*BACKBONES["dit"], *BY_CLASS, "--model.attention", "srm"),
}


def test_a_run_resumes_from_any_step_bit_for_bit(tiny, train, finished) -> None:
    each = ("--train.checkpoint_every", "1", "--train.keep_last", "9")
    whole = finished("whole", *each)
    for step in range(1, 6):
        cut = cut_off(finished(f"cut-{step}", *each), step)
        train(tiny(cut.name, *each))
        assert_same_run(cut, whole)


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_run_of_every_kind_resumes_bit_for_bit(options: tuple[str, ...], tiny, train, finished) -> None:
    whole, cut = finished("whole", *options), cut_off(finished("cut", *options))
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # truncated as by a crash
    train(tiny("cut", *options))
    assert_same_run(cut, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_resumes_bit_for_bit(number: int, tiny, train, finished, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="stopped after step 4") as stopped:
        train(tiny("cut"), at_step=lambda step: os.kill(os.getpid(), number) if step == 4 else None)
    assert stopped.value.signal_number == number
    assert (tmp_path / "cut" / "checkpoints" / "step-00000004").is_dir()
    train(tiny("cut"))
    assert_same_run(tmp_path / "cut", finished("whole"))


def test_a_finished_run_keeps_what_it_was_made_with(tiny, train, finished) -> None:
    environment = finished("run") / "environment.json"
    assert torch.__version__.startswith(json.loads(environment.read_text())["torch"])
    environment.write_text('{"torch": "another"}')  # as on another machine
    train(tiny("run"))
    assert json.loads(environment.read_text()) == {"torch": "another"}
    train(tiny("run", "--train.max_steps", "7"))
    assert torch.__version__.startswith(json.loads(environment.read_text())["torch"])


def test_a_new_run_writes_over_no_pipelines_of_another(tiny, train) -> None:
    run = cut_off(train(tiny("run")).folder.path, 0)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != ".lock"}
    for start in ((), ("--init_from", str(run))):
        with pytest.raises(InputError, match="has pipelines and no checkpoint"):
            Trainer(tiny("run", *start))
    assert {file: file.read_bytes() for file in before} == before
    shutil.rmtree(run / "pipelines" / "step-00000006")  # as if killed between its first pipeline and checkpoint
    with pytest.raises(InputError, match="has pipelines and no checkpoint"):
        Trainer(tiny("run", "--init_from", str(run)))
    assert train(tiny("run")).step == 6
    assert {file: file.read_bytes() for file in before if file.suffix == ".safetensors"}.items() <= before.items()


def test_changed_recipes_are_refused_by_name(tiny, train, finished) -> None:
    run = finished("run")
    for key, value in (
        ("--train.batch_size", "4"),
        ("--train.reference_batch_size", "8"),
        ("--seed", "1"),
        ("--model.attention", "none"),
        ("--optimizer.unit_learning_rate", "0.1"),
        ("--ssia.weight", "0.5"),
    ):
        with pytest.raises(InputError, match=rf"{key[2:]}: \S+ -> {value}"):
            Trainer(tiny("run", key, value))
    (run / "config.yaml").unlink()  # the recipe of the checkpoint counts
    with pytest.raises(InputError, match=r"train\.batch_size: 8 -> 4"):
        Trainer(tiny("run", "--train.batch_size", "4"))
    assert not (run / "config.yaml").exists(), "what is refused changes nothing"
    trainer = train(tiny("run", "--train.max_steps", "7", "--train.log_every", "2", "--train.accumulation", "2"))
    assert trainer.step == 7


def test_half_written_files_of_a_killed_run_are_removed(tiny, finished) -> None:
    left = finished("run") / "checkpoints" / ".step-00000003.elsewhere.1.partial"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    Trainer(tiny("run")).folder.unlock()
    assert not left.exists()


def test_checkpoints_of_other_models_and_data_are_refused(tiny, finished) -> None:
    own = finished("run") / "checkpoints" / "step-00000006"
    recipe = json.loads((own / "state.json").read_text())["recipe"]

    shutil.rmtree(own)
    shutil.copytree(finished("other", "--model.hidden_size", "32") / "checkpoints" / "step-00000006", own)
    with pytest.raises(InputError, match=r"model\.hidden_size: 32 -> 16"):
        Trainer(tiny("run"))
    state = read_state(own) | {"recipe": recipe}
    (own / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="of another model"):
        Trainer(tiny("run"))

    state["data"]["fingerprint"] = "0" * 64
    (own / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="other images"):
        Trainer(tiny("run"))


def test_a_run_of_randomness_1_is_not_trained_further(tiny, train) -> None:
    run = train(tiny("run")).folder.path
    make_version_1(run)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.suffix in (".json", ".jsonl")}
    with pytest.raises(InputError, match=r"run was trained with randomness 1, .* with randomness 2 .*--init-from") as e:
        Trainer(tiny("run", "--train.max_steps", "7"))
    assert "\n" not in str(e.value)
    assert train(tiny("run")).step == 6, "it is complete, and nothing is trained"
    assert {file: file.read_bytes() for file in before} == before
    new = train(tiny("new", "--init_from", str(run), "--train.max_steps", "1")).folder
    assert read_state(new.checkpoints / "step-00000001")["randomness"] == 2
    assert json.loads((new.pipelines / "step-00000001" / "training.json").read_text())["randomness"] == 2
    shutil.rmtree(run / "pipelines" / "step-00000006")  # as if killed between its first pipeline and checkpoint
    with pytest.raises(InputError, match="has pipelines and no checkpoint"):
        Trainer(tiny(cut_off(run, 0).name))


def test_a_run_in_use_is_refused(tiny) -> None:
    first = Trainer(tiny("run"))
    with pytest.raises(InputError, match=rf"in use by process {os.getpid()}"):
        Trainer(tiny("run"))
    first.folder.unlock()


class Clock:
    """A clock that advances only in sleep; the folder's lock is visible after `appears_after` seconds."""

    def __init__(self, appears_after: float):
        self.now, self.appears_after, self.asked = 0.0, appears_after, False

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def lock_text(self) -> str:
        of_main, self.asked = not self.asked, True
        return "process 1 on main" if of_main or self.now >= self.appears_after else ""


@pytest.mark.parametrize(("appears_after", "lines"), [(0, 0), (9, 0), (61, 1), (100, None)])
def test_a_folder_may_appear_as_late_as_nfs_shows_it(
    appears_after: float, lines: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, messages = Clock(appears_after), []
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=clock.sleep))
    folder = RunFolder(tmp_path)
    monkeypatch.setattr(folder, "lock_text", clock.lock_text)
    if lines is None:
        with pytest.raises(InputError, match="must be on a disk that all machines share"):
            check_shared(folder, Accelerator(cpu=True), messages.append)
        assert clock.now == pytest.approx(90, abs=1)
    else:
        check_shared(folder, Accelerator(cpu=True), messages.append)
        assert clock.now == appears_after
        assert len(messages) == lines
        assert all(re.fullmatch(rf"waiting up to 90 s for {tmp_path} to appear on \S+", line) for line in messages)


def test_the_same_commands_twice_leave_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        train = ["train", "--config", "../tiny.yaml", "--output", "run", "--train.sample_every", "3"]
        assert main([*train, "--samples.count", "4", "--samples.steps", "3"]) == 0
        assert main(["sample", "run", "--seeds", "0-4", "--steps", "3", "--out", "images"]) == 0
        assert main(["sample", "run", "--seeds", "0-4", "--steps", "3", "--out", "images.npz"]) == 0
        assert main(["fid", "run", "--reference", "digits", "--num", "70", "--steps", "2"]) == 0
    first, second = (
        {str(file.relative_to(place)): file for file in place.rglob("*") if file.is_file()}
        for place in (tmp_path / "first", tmp_path / "second")
    )
    assert first.keys() == second.keys() and any(name.endswith(".png") for name in first)
    differing = {name for name in first if first[name].read_bytes() != second[name].read_bytes()}
    assert differing <= {"run/metrics.jsonl", "run/evaluations.jsonl", "run/.lock"}
    assert metrics(tmp_path / "first" / "run") == metrics(tmp_path / "second" / "run")
    records = [
        json.loads((tmp_path / place / "run" / "evaluations.jsonl").read_text()) for place in ("first", "second")
    ]
    assert {key for key in records[0] if records[0][key] != records[1][key]} <= {"seconds", "time", "crc32"}
