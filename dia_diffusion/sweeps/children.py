"""Commands of this program as child processes, several side by side, each with its own log."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dia_diffusion.distributed import StopSignal
from dia_diffusion.environment import usable_cores
from dia_diffusion.errors import InputError, RunError, Stopped

SECONDS_BETWEEN_LOOKS = 0.5
DOING = {"train": "training", "fid": "measuring"}


@dataclass(frozen=True)
class Job:
    """Commands that work in one folder, one after the other; a command that fails ends it."""

    folder: Path
    """Where their logs lie: COMMAND.log, which each call adds to."""
    commands: list[list[str]]
    """As ["train", "--config", ...]."""


class _Child:
    """A job under way."""

    def __init__(self, job: Job, environment: dict[str, str]):
        self.job, self.environment, self.index = job, environment, -1
        self._next()

    def _next(self) -> None:
        self.index += 1
        self.job.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"$ dia-diffusion {shlex.join(self.command)}\n")
            log.flush()
            call = [sys.executable, "-m", "dia_diffusion", *self.command]
            self.process = subprocess.Popen(call, env=self.environment, stdout=log, stderr=subprocess.STDOUT)

    @property
    def command(self) -> list[str]:
        return self.job.commands[self.index]

    @property
    def log(self) -> Path:
        return self.job.folder / f"{self.command[0]}.log"

    def ended(self, ending: bool) -> bool:
        """Whether it has; after a command that ended well the next one is started, unless all are to end."""
        code = self.process.poll()
        if code == 0 and not ending and self.index + 1 < len(self.job.commands):
            self._next()
            return False
        return code is not None

    def failure(self) -> Exception:
        """In one line."""
        code = self.process.returncode
        last = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        line = f"{DOING[self.command[0]]} {self.job.folder} ended with code {code}: {' '.join(last)} ({self.log})"
        return InputError(line) if code == 2 else RunError(line)


def run_jobs(
    jobs: Sequence[Job],
    side_by_side: int,
    watch: Callable[[list[Job]], None],
    check: Callable[[Job], None] = lambda job: None,
) -> None:
    """Runs jobs in their order, so many at a time, the cores divided between them, or a GPU each.

    watch: called now and then with those under way.
    check: called with each that has ended well; an InputError of it counts as a failure.

    Raises:
        Stopped: after SIGINT or SIGTERM, once all have ended; training writes a checkpoint first.
        InputError, RunError: one has failed, with its last line; the others are stopped in the same way.
    """
    waiting, running = list(jobs), dict[int, _Child]()
    failed: Exception | None = None
    ending = False
    with StopSignal() as stop:
        try:
            while running or (waiting and not ending):
                for slot in range(side_by_side):
                    if slot not in running and waiting and not ending:
                        running[slot] = _Child(waiting.pop(0), environment_of(slot, side_by_side))
                watch([child.job for child in running.values()])
                time.sleep(SECONDS_BETWEEN_LOOKS)
                for slot, child in list(running.items()):
                    if child.ended(ending or bool(stop.received)):
                        del running[slot]
                        if not ending:
                            failed = failed or _failure(child, check)
                if (stop.received or failed) and not ending:
                    ending = True
                    for child in running.values():
                        child.process.terminate()
        finally:  # a second Ctrl-C, or an error here
            for child in running.values():
                child.process.kill()
    watch([])
    if stop.received:
        raise Stopped(stop.received, "stopped; the same command resumes from there")
    if failed is not None:
        raise failed


def _failure(child: _Child, check: Callable[[Job], None]) -> Exception | None:
    """Of a job that has ended."""
    if child.process.returncode:
        return child.failure()
    try:
        check(child.job)
    except InputError as error:
        return error
    return None


def environment_of(slot: int, side_by_side: int) -> dict[str, str]:
    """What a child is started with: its share of the cores, and its GPU where there are any."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads_of_each(side_by_side))}
    if torch.cuda.is_available():
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


def threads_of_each(side_by_side: int) -> int:
    """Of so many processes on the cores that this one may use."""
    return max(1, usable_cores() // side_by_side)
