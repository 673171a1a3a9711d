"""Concurrent child processes, with a shell in place of the library's program, which takes seconds to start."""

import json
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from dia_diffusion.errors import InputError, RunError, Stopped
from dia_diffusion.sweeps.launcher import Job, environment_of, run_jobs, threads_per_job
from tests.processes import wait_for


@pytest.fixture(autouse=True)
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """["train", TEXT] runs TEXT in a shell."""
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\nexec sh -c "$4"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr("dia_diffusion.sweeps.launcher.POLL_SECONDS", 0.02)


def jobs(folder: Path, *texts: list[str]) -> list[Job]:
    return [Job(folder / f"run{i}", [["train", text] for text in each]) for i, each in enumerate(texts)]


def waiting(ready: Path) -> str:
    """A script that creates `ready` once it can be asked to stop."""
    return f"trap 'echo asked to stop; exit 143' TERM; touch {ready}; while true; do sleep 0.05; done"


def until(file: Path) -> str:
    return f"while [ ! -e {file} ]; do sleep 0.02; done"


def test_jobs_run_in_order_with_limited_parallelism(tmp_path: Path) -> None:
    order = tmp_path / "order"
    seen = []
    work = [[f"echo {i}a >> {order}; sleep 0.1", f"echo {i}b >> {order}"] for i in range(5)]
    run_jobs(jobs(tmp_path, *work), 2, lambda running: seen.append([job.folder.name for job in running]))
    lines = order.read_text().split()
    assert sorted(lines) == sorted(f"{i}{part}" for i in range(5) for part in "ab")
    assert lines[0] in ("0a", "1a") and lines.index("4a") >= 4
    assert max(map(len, seen)) == 2 and seen[0] == ["run0", "run1"] and seen[-1] == []
    log = (tmp_path / "run3" / "train.log").read_text()
    assert log.count("$ dia-diffusion train") == 2, "each command is in the log of its run"


@pytest.mark.parametrize(("code", "kind"), [(2, InputError), (1, RunError), (137, RunError)])
def test_a_failed_job_ends_the_others(code: int, kind: type[Exception], tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    work = [[f"{until(ready)}; echo no such thing; exit {code}", "echo never"], [waiting(ready)], ["echo never"]]
    with pytest.raises(kind) as failed:
        run_jobs(jobs(tmp_path, *work), 2, lambda running: None)
    log = tmp_path / "run0" / "train.log"
    assert str(failed.value) == f"training {tmp_path / 'run0'} ended with code {code}: no such thing ({log})"
    assert "asked to stop" in (tmp_path / "run1" / "train.log").read_text()
    assert not (tmp_path / "run2").exists() and "never\n" not in log.read_text().replace("'echo never'", "")


def test_a_job_that_fails_its_check_counts_as_failed(tmp_path: Path) -> None:
    def check(job: Job) -> None:
        raise InputError(f"{job.folder.name} is wrong")

    ready = tmp_path / "ready"
    with pytest.raises(InputError, match="run0 is wrong"):
        run_jobs(jobs(tmp_path, [until(ready)], [waiting(ready)], ["echo never"]), 2, lambda running: None, check)
    assert "asked to stop" in (tmp_path / "run1" / "train.log").read_text()
    assert not (tmp_path / "run2").exists()


def test_a_signal_ends_running_jobs_and_starts_no_others(tmp_path: Path) -> None:
    ready = tmp_path / "ready"

    def interrupt() -> None:
        wait_for(ready.exists)
        os.kill(os.getpid(), 2)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Stopped) as stopped:
        run_jobs(jobs(tmp_path, [waiting(ready), "echo never"], ["echo never"]), 1, lambda running: None)
    assert stopped.value.signal_number == 2 and "the same command resumes" in str(stopped.value)
    assert "asked to stop" in (tmp_path / "run0" / "train.log").read_text()
    assert not (tmp_path / "run1").exists()


def test_each_job_has_its_share_of_the_cores_and_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert [threads_per_job(count) for count in (1, 2, 4, 9)] == [6, 3, 1, 1]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [environment_of(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    found = tmp_path / "found"
    show = f'echo "[$OMP_NUM_THREADS, $CUDA_VISIBLE_DEVICES]" >> {found}; sleep 0.2'
    run_jobs(jobs(tmp_path, [show], [show]), 2, lambda running: None)
    assert sorted(json.loads(line) for line in found.read_text().splitlines()) == [[3, 5], [3, 7]]
