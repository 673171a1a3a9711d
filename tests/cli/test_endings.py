"""Endings not caused by bad input: a full disk, too little memory, a signal."""

import re
import signal
from functools import partial
from pathlib import Path

import pytest
from safetensors import SafetensorError

from tests.cli.one_line import error_of
from tests.processes import Forked, hold_steps
from tests.training.conftest import TINY


def test_a_full_disk_is_one_line_and_exit_code_1(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        # As safetensors raises it on a full tmpfs.
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("dia_diffusion.training.checkpoint.save_file", full)
    resume = ["train", "--config", run.parent / "tiny.yaml", "--output", run, "--train.max_steps", "7"]
    error = error_of(resume, capsys, code=1)
    assert re.search(rf"No space left on device \(it takes .*\): {run}/checkpoints/step-00000007", error), error
    assert (run / "checkpoints" / "step-00000006" / "state.json").is_file()


def test_too_much_for_the_memory_is_one_line_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.safetensors"
    huge = ["stats", "make", "digits", out, "--size", "100000000"]
    assert "Unable to allocate" in error_of(huge, capsys, code=1)
    assert not out.exists()


def test_sigterm_ends_training_with_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    run, gate = tmp_path / "run", tmp_path / "gate"
    command = ["train", "--config", tmp_path / "tiny.yaml", "--output", run, "--train.checkpoint_every", 100]
    process = Forked(*command, log=tmp_path / "log", prepare=partial(hold_steps, 3, gate))
    process.until(gate.exists)
    process.send(signal.SIGTERM)
    gate.unlink()
    assert process.wait() == 143
    assert process.last_line().endswith("stopped after step 3; the same command resumes from there")
    assert [place.name for place in (run / "checkpoints").iterdir()] == ["step-00000003"]
