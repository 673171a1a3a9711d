"""Processes wait for the run's folder to appear on their machine, as on NFS, before they refuse to train."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator

from dia_diffusion.errors import InputError
from dia_diffusion.training import run_folder
from dia_diffusion.training.run_folder import RunFolder, check_shared


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
