"""`curves STUDY` end to end: interrupted, resumed and drawn; and refused input."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dia_diffusion.cli.curves import names_study
from dia_diffusion.cli.main import main
from dia_diffusion.evaluation.record import read_records
from dia_diffusion.io import sha256_of_file
from dia_diffusion.locks import FolderLock
from dia_diffusion.sweeps.sweep import read_study
from dia_diffusion.training.trainer import Trainer
from tests.cli.one_line import error_of
from tests.processes import Child, wait_for
from tests.training.conftest import TINY, Recorder

pytestmark = pytest.mark.usefixtures("coarse_figures")
STUDY = """
output: {folder}/out
recipe: {folder}/tiny.yaml
runs: [{{units: [none, dia-lstm], batch_sizes: [8], seeds: [0]}}]
steps: 20
points: 2
protocol: {folder}/quick.yaml
"""
PROTOCOL = "{features: digits, num_samples: 70, sampler: ddim, steps: 2, reference_split: test}"
WEIGHTS = "pipelines/step-00000020/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def study(tmp_path: Path) -> str:
    """A study of two runs and a protocol, each of which takes seconds."""
    (tmp_path / "tiny.yaml").write_text(
        TINY.replace("log_every: 1", "log_every: 5") + "samples: {count: 2, steps: 2}\n"
    )
    (tmp_path / "quick.yaml").write_text(PROTOCOL)
    (tmp_path / "mine.yaml").write_text(STUDY.format(folder=tmp_path))
    return str(tmp_path / "mine.yaml")


def test_an_interrupted_study_resumes_to_identical_results(
    study: str,
    children: type[Child],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One thread per job for any number of cores and jobs: the thread count changes the last bits of sums.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    first = tmp_path / "out" / "none-b8-s0"

    def interrupt() -> None:
        wait_for((first / "train.gate").exists)
        os.kill(os.getpid(), signal.SIGINT)

    children.held_step = 7
    threading.Thread(target=interrupt, daemon=True).start()
    assert main(["curves", study]) == 130
    assert "the same command resumes" in capfd.readouterr().err
    assert [path.name for path in (first / "checkpoints").iterdir()] == ["step-00000007"]
    assert not (tmp_path / "out" / "dia-lstm-b8-s0" / "metrics.jsonl").exists()

    children.held_step = None
    assert main(["curves", study, "--jobs", "2"]) == 0
    shown = capfd.readouterr().out
    assert "2 of 2 runs to train or to measure, 2 at a time" in shown and "FD(digits)" in shown
    assert "resuming from step 7" in (first / "train.log").read_text()
    torch.set_num_threads(1)
    for run in read_study(study, output=str(tmp_path / "unstopped")).runs:
        Trainer(run.experiment, Recorder()).run()
        assert sha256_of_file(tmp_path / "out" / run.name / WEIGHTS) == sha256_of_file(run.folder / WEIGHTS)
        records = read_records(tmp_path / "out" / run.name / "evaluations.jsonl")
        assert [(record.step, record.protocol_name) for record in records] == [(10, "quick"), (20, "quick")]
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"study.yaml", "curves.png", "results.json", "grids-b8.png"} <= made
    points = json.loads((tmp_path / "out" / "results.json").read_text())["points"]
    assert [(p["unit"], p["step"]) for p in points] == [(u, s) for u in ("none", "dia-lstm") for s in (10, 20)]

    logs = {path: path.read_text() for path in (tmp_path / "out").glob("*/*.log")}
    (tmp_path / "out" / "curves.png").unlink()
    assert main(["curves", study]) == 0 and main(["curves", str(tmp_path / "out"), "--only-plot"]) == 0
    assert (tmp_path / "out" / "curves.png").is_file()
    assert {path: path.read_text() for path in logs} == logs, "what is there is not done again"

    (tmp_path / "quick.yaml").write_text(PROTOCOL.replace("70", "71"))
    assert main(["curves", study]) == 2
    assert "records of a protocol quick with other settings" in capfd.readouterr().err


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Restores the number of threads after each test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_plan_writes_nothing(study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curves", study, "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "2 runs, 0 complete" in shown and "core-hours" in shown and "Disk: 0.00 GB" in shown
    rows = [line.split()[:5] for line in shown.splitlines() if line.strip().startswith("8 ")]
    assert rows == [["8", "none", "1", "0", "20"], ["8", "dia-lstm", "1", "0", "20"]]
    assert not (tmp_path / "out").exists()


def test_a_study_that_is_under_way_is_refused(study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FolderLock(tmp_path / "out"):
        assert "is in use by process" in error_of(["curves", study], capsys)
    assert "has no evaluations" in error_of(["curves", study, "--only-plot"], capsys)


def test_options_of_the_other_kind_and_missing_things(
    study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, said in (
        ([tmp_path, "--plan"], "--plan: not an option of run folders"),
        ([study, "--final-protocol", "letters"], "got 'letters'"),
        ([study, "--data", tmp_path / "none.zip"], "none.zip"),
        ([study, "--reference", tmp_path / "none.zip"], "none.zip', which is not a file or folder"),
    ):
        assert said in error_of(["curves", *arguments], capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without a launcher" in error_of(["curves", study], capsys)
    assert not list((tmp_path / "out").glob("*/*"))


def test_a_name_is_a_study_unless_a_run_has_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert names_study("digits") and names_study("eval/curves/digits.yaml")
    Path("digits").mkdir()
    assert names_study("digits"), "a folder of images, say"
    Path("digits/evaluations.jsonl").touch()
    assert not names_study("digits") and names_study("digits.yaml")
    Path("other").mkdir()
    assert not names_study("other")
    Path("other/study.yaml").touch()
    assert names_study("other")
