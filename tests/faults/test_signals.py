"""SIGINT and SIGTERM: finished work is written, the exit code is 128 + n, and the last line says how to resume."""

import re
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dia_diffusion.cli.main import main
from tests.cli.test_study import PROTOCOL, STUDY
from tests.faults.harness import being_written, checkpoints, leftovers
from tests.processes import Forked, hold, hold_checkpoints, hold_evaluation, hold_steps
from tests.training.classify import TINY as CLASSIFY

BOTH = pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])


def test_classify_leaves_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    (tmp_path / "classify.yaml").write_text(CLASSIFY)
    command = ["classify", "--config", tmp_path / "classify.yaml", "--output", run, "--train.checkpoint_every", 100]
    gate = tmp_path / "gate"
    running = Forked(*command, log=log, prepare=partial(hold_steps, 2, gate))
    running.until(gate.exists)
    running.send(signal.SIGTERM)
    gate.unlink()
    assert running.wait() == 143
    line = "dia-diffusion classify: stopped after step 2; the same command resumes from there"
    assert running.last_line() == line
    assert checkpoints(run) == [2]
    capsys.readouterr()
    assert main([str(part) for part in command]) == 0
    assert "resuming from step 2" in capsys.readouterr().out


def test_a_second_interrupt_ends_training_at_once(recipe: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = ["train", "--config", recipe, "--output", run, "--train.max_steps", 1000, "--train.checkpoint_every", 900]
    running = Forked(*command, log=log, prepare=partial(hold_checkpoints, 1))
    running.until((run / "metrics.jsonl").is_file)
    running.send(signal.SIGINT)
    running.until(lambda: being_written(run))
    running.send(signal.SIGINT)
    assert running.wait() == 130
    line = "dia-diffusion train: stopped immediately; the same command resumes from the last checkpoint"
    assert running.last_line() == line and "Traceback" not in running.text()
    assert not checkpoints(run) and not leftovers(run)


@BOTH
def test_sample_keeps_its_images(number: int, code: int, trained: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "images", tmp_path / "log"
    command = ["sample", trained / "run", "--seeds", "0-49", "--steps", 1, "--out", out]
    running = Forked(*command, log=log, prepare=partial(hold, "dia_diffusion.sampling.writers", "save_png", 5))
    running.until(lambda: len(list(out.glob("*.png"))) == 5)
    running.send(number)
    assert running.wait() == code
    assert running.last_line() == "dia-diffusion sample: stopped; the same command draws the missing images"
    made = {file: file.stat().st_mtime_ns for file in out.glob("*.png")}
    assert len(made) == 5 and not leftovers(out)
    assert main([str(part) for part in command]) == 0
    assert len(list(out.glob("*.png"))) == 50 and {file: file.stat().st_mtime_ns for file in made} == made


def test_fid_keeps_its_chunks(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log, record = tmp_path / "log", tmp_path / "records.jsonl"
    command = ["fid", trained / "run", "--reference", "digits", "--num", 1000, "--steps", 1, "--record", record]
    monkeypatch.setenv("DIA_DIFFUSION_CACHE", str(tmp_path / "cache"))
    running = Forked(*command, log=log, prepare=partial(hold_evaluation, 1))
    running.until(lambda: list(tmp_path.glob("records.unfinished/*/chunk-*.safetensors")))
    running.send(signal.SIGINT)
    assert running.wait() == 130
    assert re.fullmatch(
        r"dia-diffusion fid: stopped; the same command resumes after the last finished chunk of images, kept in .*",
        running.last_line(),
    )
    capsys.readouterr()
    assert main([str(part) for part in command]) == 0
    assert "resuming after 500 of 1,000 images" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize(
    ("numbers", "code"), [([signal.SIGTERM], 143), ([signal.SIGINT], 130), ([signal.SIGINT] * 2, 130)]
)
def test_study_ends_what_it_started(numbers: list[int], code: int, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text(PROTOCOL)
    (tmp_path / "mine.yaml").write_text(STUDY.format(folder=tmp_path).replace("steps: 20", "steps: 20000"))
    first, log = tmp_path / "out" / "none-b8-s0", tmp_path / "log"
    running = Forked("curves", tmp_path / "mine.yaml", log=log)
    running.until((first / "metrics.jsonl").is_file)
    sent = time.monotonic()
    for number in numbers:
        running.send(number)
        time.sleep(0.2)
    assert running.wait() == code
    print(f"ended {time.monotonic() - sent:.1f} s after {len(numbers)} signals")
    assert time.monotonic() - sent < 10
    if len(numbers) == 1:
        how = "stopped; the same command resumes from there"
        assert checkpoints(first)
    else:
        how = "stopped immediately; the same command resumes"
    assert running.last_line() == f"dia-diffusion curves: {how}"
    # A child that is still alive would hold its lock, and this command would be refused.
    again = Forked("curves", tmp_path / "mine.yaml", log=log)
    again.until(lambda: (first / "train.log").read_text().count("$ dia-diffusion train") == 2)
    again.send(signal.SIGTERM)
    assert again.wait() == 143


@pytest.mark.long
def test_a_large_model_is_written_within_ten_seconds(tmp_path: Path) -> None:
    """U-ViT-S/2, 44 million parameters, with batches of 4 on one core."""
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    run, log = tmp_path / "run", tmp_path / "log"
    changed = {"data.source": tmp_path / "images.npy", "train.batch_size": 4, "train.log_every": 1}
    changed |= {"train.mixed_precision": "none", "train.compile": "false", "train.sample_every": 0}
    options = [text for key, value in changed.items() for text in (f"--{key}", value)]
    running = Forked("train", "--config", "cifar10_uvit_s2_dia", "--output", run, *options, log=log)
    running.until((run / "metrics.jsonl").is_file, 200)
    running.send(signal.SIGTERM)
    sent = time.monotonic()
    assert running.wait() == 143, running.text()
    seconds = time.monotonic() - sent
    size = sum(file.stat().st_size for file in (run / "checkpoints").rglob("*.safetensors"))
    print(f"{seconds:.1f} s from the signal to the end, {size / 1e6:.0f} MB of checkpoint")
    assert seconds < 10
