"""The quickstart, a few steps long: what it leaves, going on, and being stopped."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from dia_diffusion.cli.main import main


def test_quickstart_leaves_what_it_says(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "quickstart"
    assert main(["quickstart", "--out", str(out), "--steps", "2"]) == 0
    shown = capfd.readouterr().out
    for path in ("samples.png", "curve.png", "dia-lstm/pipelines/step-00000002"):
        assert str(out / path) in shown and (out / path).exists()
    assert Image.open(out / "samples.png").size[0] > 800
    assert "UViT + DIA-LSTM" in shown and "real digits" in shown
    record = (out / "none" / "evaluations.jsonl").read_text()

    assert main(["fid", str(out / "none"), "--reference", "digits", "--num", "70", "--steps", "2"]) == 0
    assert main(["quickstart", "--out", str(out), "--steps", "2"]) == 0, "a second call only draws again"
    assert (out / "none" / "evaluations.jsonl").read_text().startswith(record)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_quickstart_stops_its_trainings(number: int, tmp_path: Path) -> None:
    call = [sys.executable, "-m", "dia_diffusion", "quickstart", "--out", str(tmp_path / "q")]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = [tmp_path / "q" / unit / "metrics.jsonl" for unit in ("none", "dia-lstm")]
    deadline = time.monotonic() + 100
    while not all(path.is_file() for path in started) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "the same command goes on" in error
    for path in started:
        assert list((path.parent / "checkpoints").glob("step-*")), "each training wrote a checkpoint"


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--out", str(tmp_path / "q"), "--seed", "-1"]) == 2
    assert main(["quickstart", "--out", "/dev/null"]) == 1
    assert capsys.readouterr().err.count("\n") == 2
