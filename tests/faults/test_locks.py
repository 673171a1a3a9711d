"""Two commands in one folder: the second is refused and names the first; a dead process holds no lock."""

import errno
import fcntl
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from dia_diffusion.cli.main import main
from dia_diffusion.errors import InputError
from dia_diffusion.locks import FolderLock
from tests.cli.one_line import error_of
from tests.cli.test_study import PROTOCOL, STUDY
from tests.processes import FORKED, Forked, hold_steps, wait_for


def test_a_run_is_trained_by_one_command(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    command = ["train", "--config", recipe, "--output", run]
    first = Forked(*command, log=tmp_path / "log", prepare=partial(hold_steps, 2))
    first.until((run / "metrics.jsonl").is_file)
    before = (run / "config.yaml").read_bytes()
    error = error_of([*command, "--train.max_steps", 7], capsys)
    assert f"{run} is in use by process {first.process.pid} on {socket.gethostname()}; stop it" in error
    assert (run / "config.yaml").read_bytes() == before
    assert first.process.is_alive()
    first.kill()
    assert main([*map(str, command)]) == 0


def test_a_study_is_run_by_one_command(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "quick.yaml").write_text(PROTOCOL)
    (tmp_path / "mine.yaml").write_text(STUDY.format(folder=tmp_path))
    lock = FolderLock(tmp_path / "out")
    first = FORKED.Process(target=hold, args=(tmp_path / "out",), daemon=True)
    first.start()
    wait_for(lambda: lock.path.is_file() and lock.text())
    error = error_of(["curves", tmp_path / "mine.yaml"], capsys)
    assert f"{tmp_path}/out is in use by process {first.pid} on {socket.gethostname()}; stop it" in error
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    with lock:
        assert f"process {os.getpid()} on" in lock.text()


def hold(folder: Path) -> None:
    with FolderLock(folder):
        time.sleep(60)


def test_a_stale_lock_of_another_machine_is_ignored(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("process 1 on a-machine-that-is-gone\n0123\n")
    assert main(["train", "--config", str(recipe), "--output", str(tmp_path / "run")]) == 0
    assert f"process {os.getpid()} on {socket.gethostname()}" in (tmp_path / "run" / ".lock").read_text()


def test_threads_exclude_each_other_and_each_holder_writes_a_new_text(tmp_path: Path) -> None:
    texts = []
    for _ in range(2):
        with FolderLock(tmp_path) as lock, ThreadPoolExecutor(1) as pool:
            texts.append(lock.text())
            with pytest.raises(InputError, match=f"in use by process {os.getpid()} on "):
                pool.submit(FolderLock(tmp_path).acquire).result()
            assert lock.text() == texts[-1]
    assert len(set(texts)) == 2 and lock.path.is_file()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_refused(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    expected = f"output must be a folder that can be written and locked, got {tmp_path}: {os.strerror(number)}"
    with pytest.raises(InputError, match=re.escape(expected)):
        FolderLock(tmp_path).acquire()
