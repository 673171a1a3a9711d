"""Runs that were stopped or killed resume bit for bit, or are refused; the same commands leave the same bytes."""

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
from dia_diffusion.training.checkpoint import load_checkpoint, read_state
from dia_diffusion.training.run_folder import RunFolder, check_shared
from dia_diffusion.training.trainer import Trainer
from tests.training.conftest import TINY
from tests.training.run_files import assert_same_run, make_version_1, metrics


def test_a_run_goes_on_from_any_step_bit_for_bit(tiny, train, tmp_path: Path) -> None:
    each = ("--train.checkpoint_every", "1", "--train.keep_last", "9")
    train(tiny("whole", *each))
    for step in range(1, 6):
        cut = shutil.copytree(tmp_path / "whole", tmp_path / f"cut-{step}")
        for later in range(step + 1, 7):
            shutil.rmtree(cut / "checkpoints" / f"step-{later:08d}")
        train(tiny(cut.name, *each))
        assert_same_run(cut, tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_bit_for_bit(number: int, tiny, train, tmp_path: Path) -> None:
    train(tiny("whole"))
    with pytest.raises(Stopped, match="stopped after step 4") as stopped:
        train(tiny("cut"), at_step=lambda step: os.kill(os.getpid(), number) if step == 4 else None)
    assert stopped.value.signal_number == number
    assert (tmp_path / "cut" / "checkpoints" / "step-00000004").is_dir()
    train(tiny("cut"))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_run_killed_after_its_checkpoint_repeats_the_lost_steps(tiny, train, tmp_path: Path) -> None:
    train(tiny("whole"))
    train(tiny("killed"))
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step-00000006")
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # truncated as by a crash
    train(tiny("killed"))
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_finished_run_keeps_what_it_was_made_with(tiny, train, tmp_path: Path) -> None:
    train(tiny("run", "--train.max_steps", "1"))
    environment = tmp_path / "run" / "environment.json"
    assert torch.__version__.startswith(json.loads(environment.read_text())["torch"])
    environment.write_text('{"torch": "another"}')  # as on another machine
    train(tiny("run", "--train.max_steps", "1"))
    assert json.loads(environment.read_text()) == {"torch": "another"}
    train(tiny("run", "--train.max_steps", "2"))
    assert torch.__version__.startswith(json.loads(environment.read_text())["torch"])


def test_a_run_with_a_rate_for_its_unit_goes_on_bit_for_bit(tiny, train, tmp_path: Path) -> None:
    own = ("--optimizer.unit_learning_rate", "1e-4", "--model.attention", "block-channels")
    train(tiny("whole", *own))
    train(tiny("cut", *own))
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000006")
    train(tiny("cut", *own))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    with pytest.raises(InputError, match=r"optimizer\.unit_learning_rate: 0\.0001 -> None"):
        Trainer(tiny("cut", *own[2:]))


def test_a_new_run_writes_over_no_pipelines_of_another(tiny, train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny("run"))
    shutil.rmtree(run / "checkpoints")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != ".lock"}
    for start in ((), ("--init_from", str(run))):
        with pytest.raises(InputError, match="has pipelines and no checkpoint"):
            Trainer(tiny("run", *start))
    assert {file: file.read_bytes() for file in before} == before
    shutil.rmtree(run / "pipelines" / "step-00000006")  # now as killed between its first pipeline and checkpoint
    with pytest.raises(InputError, match="has pipelines and no checkpoint"):
        Trainer(tiny("run", "--init_from", str(run)))
    assert train(tiny("run")).step == 6
    assert {file: file.read_bytes() for file in before if file.suffix == ".safetensors"}.items() <= before.items()


def test_changed_recipes_are_refused_by_name(tiny, train, tmp_path: Path) -> None:
    train(tiny("run"))
    for key, value in (("--train.batch_size", "4"), ("--seed", "1"), ("--model.attention", "none")):
        with pytest.raises(InputError, match=rf"{key[2:]}: \S+ -> {value}"):
            Trainer(tiny("run", key, value))
    (tmp_path / "run" / "config.yaml").unlink()  # the recipe of the checkpoint counts
    with pytest.raises(InputError, match=r"train\.batch_size: 8 -> 4"):
        Trainer(tiny("run", "--train.batch_size", "4"))
    assert not (tmp_path / "run" / "config.yaml").exists(), "what is refused changes nothing"
    trainer = train(tiny("run", "--train.max_steps", "7", "--train.log_every", "2", "--train.accumulation", "2"))
    assert trainer.step == 7


@pytest.mark.parametrize("schedule", ["cosine", "warmup-stable-decay"])
def test_a_run_with_a_falling_rate_keeps_its_length(schedule: str, tiny, train) -> None:
    train(tiny("run", "--optimizer.schedule", schedule))
    with pytest.raises(InputError, match=r"train\.max_steps: 6 -> 9"):
        Trainer(tiny("run", "--optimizer.schedule", schedule, "--train.max_steps", "9"))


def test_what_a_killed_run_left_half_written_is_removed(tiny, train, tmp_path: Path) -> None:
    left = tmp_path / "run" / "checkpoints" / ".step-00000003.elsewhere.1.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    train(tiny("run"))
    assert not left.exists()


def test_checkpoints_of_other_models_and_data_are_refused(tiny, train, tmp_path: Path) -> None:
    train(tiny("run"))
    train(tiny("other", "--model.hidden_size", "32"))
    own = tmp_path / "run" / "checkpoints" / "step-00000006"
    recipe = json.loads((own / "state.json").read_text())["recipe"]

    shutil.rmtree(own)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step-00000006", own)
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


def test_a_pickle_is_not_loaded_as_a_checkpoint(tiny, train, tmp_path: Path) -> None:
    train(tiny("run"))
    place = tmp_path / "run" / "checkpoints" / "step-00000006"
    torch.save({"a": torch.zeros(1)}, place / "model.safetensors")
    with pytest.raises(InputError, match="sha256 differs"):
        load_checkpoint(place)


def test_a_run_of_randomness_1_is_not_trained_on(tiny, train, tmp_path: Path) -> None:
    train(tiny("run"))
    make_version_1(tmp_path / "run")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.suffix in (".json", ".jsonl")}
    with pytest.raises(InputError, match=r"run was trained with randomness 1, .* with randomness 2 .*--init-from") as e:
        Trainer(tiny("run", "--train.max_steps", "7"))
    assert "\n" not in str(e.value)
    assert train(tiny("run")).step == 6, "it is complete, and nothing is trained"
    assert {file: file.read_bytes() for file in before} == before
    assert train(tiny("new", "--init_from", str(tmp_path / "run"))).step == 6
    assert read_state(tmp_path / "new" / "checkpoints" / "step-00000006")["randomness"] == 2
    assert (
        json.loads((tmp_path / "new" / "pipelines" / "step-00000006" / "training.json").read_text())["randomness"] == 2
    )
    # As killed between its first pipeline and its first checkpoint.
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "run" / "pipelines" / "step-00000006")
    with pytest.raises(InputError, match="has pipelines and no checkpoint"):
        Trainer(tiny("run"))


def test_a_run_in_use_is_refused(tiny, train) -> None:
    def second_run(step: int) -> None:
        with pytest.raises(InputError, match=rf"in use by process {os.getpid()}"):
            Trainer(tiny("run"))

    train(tiny("run"), at_step=second_run)


class Clock:
    """Time that passes only in sleep; the folder's lock is seen after so many seconds."""

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
    clock, told = Clock(appears_after), []
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=clock.sleep))
    folder = RunFolder(tmp_path)
    monkeypatch.setattr(folder, "lock_text", clock.lock_text)
    if lines is None:
        with pytest.raises(InputError, match="all machines must share it"):
            check_shared(folder, Accelerator(cpu=True), told.append)
        assert clock.now == pytest.approx(90, abs=1)
    else:
        check_shared(folder, Accelerator(cpu=True), told.append)
        assert clock.now == appears_after
        assert len(told) == lines
        assert all(re.fullmatch(rf"waiting up to 90 s for {tmp_path} to appear on \S+", line) for line in told)


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
