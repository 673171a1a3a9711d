"""Ends that are nobody's bad input: a full disk, too little memory, a signal."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from tests.cli.one_line import error_of
from tests.training.conftest import TINY


def test_a_full_disk_is_one_line_and_exit_code_1(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        # What safetensors raises, seen on a full tmpfs.
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_training_with_a_checkpoint(number: int, code: int, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    arguments = ["train", "--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "run")]
    arguments += ["--train.max_steps", "100000", "--train.checkpoint_every", "90000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dia_diffusion", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 100
    while not (tmp_path / "run" / "metrics.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    stopped = re.search(r"stopped after step ([\d,]+); the same command goes on", error)
    assert stopped is not None, error
    step = int(stopped[1].replace(",", ""))
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()
