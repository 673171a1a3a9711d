"""The quickstart with a few steps: its files, a second call, and stopping it."""

import os
import threading
from pathlib import Path
from signal import SIGINT, SIGTERM

import pytest
from PIL import Image

from dia_diffusion.cli.main import main
from tests.processes import Child, wait_for


def test_quickstart_writes_the_files_it_prints(
    children: type[Child], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = "{features: digits, num_samples: 100, sampler: dpmsolver++, steps: 3, reference_split: test}"
    (tmp_path / "quick.yaml").write_text(protocol)
    monkeypatch.setattr("dia_diffusion.cli.quickstart.PROTOCOL", str(tmp_path / "quick.yaml"))
    out = tmp_path / "quickstart"
    assert main(["quickstart", "--out", str(out), "--steps", "2"]) == 0
    shown = capfd.readouterr().out
    for path in ("samples.png", "curve.png", "dia-lstm-identity/pipelines/step-00000002"):
        assert str(out / path) in shown and (out / path).exists()
    assert Image.open(out / "samples.png").size[0] > 800
    assert "UViT + DIA-LSTM" in shown and "real digits" in shown

    record = (out / "none" / "evaluations.jsonl").read_text()
    assert main(["fid", str(out / "none"), "--reference", "digits", "--num", "70", "--steps", "2"]) == 0
    assert main(["quickstart", "--out", str(out), "--steps", "2"]) == 0, "a second call only draws again"
    assert (out / "none" / "evaluations.jsonl").read_text().startswith(record)


@pytest.mark.parametrize("number", [SIGINT, SIGTERM])
def test_a_stopped_quickstart_stops_its_trainings(
    number: int, children: type[Child], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = [tmp_path / "q" / unit for unit in ("none", "dia-lstm-identity")]
    children.held_step = 3

    def stop() -> None:
        wait_for(lambda: all((run / "train.gate").exists() for run in runs))
        os.kill(os.getpid(), number)

    threading.Thread(target=stop, daemon=True).start()
    assert main(["quickstart", "--out", str(tmp_path / "q")]) == 128 + number
    assert "the same command resumes" in capfd.readouterr().err
    for run in runs:
        assert [place.name for place in (run / "checkpoints").iterdir()] == ["step-00000003"]


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--out", str(tmp_path / "q"), "--seed", "-1"]) == 2
    assert main(["quickstart", "--out", "/dev/null"]) == 1
    assert capsys.readouterr().err.count("\n") == 2
