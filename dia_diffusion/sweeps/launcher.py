"""Trains and measures missing runs by running this program's commands as child processes, each with its own log."""

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
from dia_diffusion.evaluation.record import count_records
from dia_diffusion.sweeps.collect import Inventory, RunState, measured
from dia_diffusion.sweeps.sweep import Run, Study
from dia_diffusion.training.run_folder import RunFolder, logged_step

POLL_SECONDS = 0.5
DOING = {"train": "training", "trials": "training", "fid": "measuring"}
PASSES_OF_STEP = 3
"""Cost of a training step per image, in forward passes: the backward pass counts as two."""

Progress = Callable[[int, int, str], None]
"""Called with the amount done, the total, and a description of the current work."""


@dataclass(frozen=True)
class Job:
    """Commands that run one after the other in one folder; the job ends if one fails."""

    folder: Path
    """Contains the logs COMMAND.log, to which each call appends."""
    commands: list[list[str]]
    """Each such as ["train", "--config", ...]."""
    log_suffix: str = ""
    """Distinguishes the logs of jobs in the same folder: COMMAND-1.log."""


class _Child:
    """A running job."""

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
        return self.job.folder / f"{self.command[0]}{self.job.log_suffix}.log"

    def ended(self, stopping: bool) -> bool:
        """Whether the job has ended. Starts the next command after one that succeeded, unless `stopping`."""
        code = self.process.poll()
        if code == 0 and not stopping and self.index + 1 < len(self.job.commands):
            self._next()
            return False
        return code is not None

    def failure(self, check: Callable[[Job], None]) -> Exception | None:
        """Why the job failed, in one line; None if it succeeded."""
        code = self.process.returncode
        if code:
            last = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            line = f"{DOING[self.command[0]]} {self.job.folder} ended with code {code}: {' '.join(last)} ({self.log})"
            return InputError(line) if code == 2 else RunError(line)
        try:
            check(self.job)
        except InputError as error:
            return error
        return None


def run_jobs(
    jobs: Sequence[Job],
    max_parallel: int,
    progress: Callable[[list[Job]], None] = lambda running: None,
    check: Callable[[Job], None] = lambda job: None,
) -> None:
    """Runs jobs in order, `max_parallel` at a time; these share the cores or have a GPU each.

    progress: called every half second with the running jobs.
    check: called with each job that succeeded; if it raises InputError, the job counts as failed.

    Raises:
        Stopped: after SIGINT or SIGTERM, once all jobs have ended; trainings write a checkpoint first.
        InputError, RunError: a job failed; the message is its last line. The others are stopped in the same way.
    """
    waiting, running = list(jobs), dict[int, _Child]()
    failed: Exception | None = None
    stopping = False
    with StopSignal() as stop:
        try:
            while running or (waiting and not stopping):
                for slot in range(max_parallel):
                    if slot not in running and waiting and not stopping:
                        running[slot] = _Child(waiting.pop(0), environment_of(slot, max_parallel))
                progress([child.job for child in running.values()])
                time.sleep(POLL_SECONDS)
                for slot, child in list(running.items()):
                    if child.ended(stopping or bool(stop.received)):
                        del running[slot]
                        if not stopping:
                            failed = failed or child.failure(check)
                if (stop.received or failed) and not stopping:
                    stopping = True
                    for child in running.values():
                        child.process.terminate()
        finally:  # a second Ctrl-C, or an error here
            for child in running.values():
                child.process.kill()
    progress([])
    if stop.received:
        raise Stopped(stop.received, "stopped; the same command resumes from there")
    if failed is not None:
        raise failed


def environment_of(slot: int, max_parallel: int) -> dict[str, str]:
    """A child's environment: its share of the cores, and its GPU if there are GPUs."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads_per_job(max_parallel))}
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


def threads_per_job(max_parallel: int) -> int:
    """A job's share of the cores that this process may use."""
    return max(1, usable_cores() // max_parallel)


def run_study(inventory: Inventory, max_parallel: int, progress: Progress, fid_options: Sequence[str] = ()) -> None:
    """Trains and measures the missing runs; a run's training and its measurements are one job.

    progress: in passes of one image through the network.
    fid_options: for all measurements.

    Raises:
        InputError, RunError, Stopped: see `run_jobs`; finished work stays, and the same call resumes.
        InputError: a run is in use by another process, such as one that outlived an earlier study; or a run was
            measured in a way that can't share a curve with the others, which are then stopped.
    """
    study = inventory.study
    jobs = [_job(study, state, fid_options) for state in inventory.states if not state.complete]
    passes = _Passes(inventory)
    complete = [state.run for state in inventory.states if state.complete]

    def check(job: Job) -> None:
        complete.append(next(run for run in study.runs if run.folder == job.folder))
        for protocol in study.protocols:
            measured(complete, protocol)  # not runs that are being written

    run_jobs(jobs, max_parallel, lambda running: progress(*passes(running)), check)


def commands(study: Study, state: RunState, fid_options: Sequence[str] = ()) -> list[list[str]]:
    """The commands that complete a run, as typed after `dia-diffusion`."""
    folder, config = RunFolder(state.run.folder), study.config
    options = [*([] if config.reference is None else ["--reference", config.reference]), *fid_options]
    missing = []
    if not state.trained:
        missing.append(["train", "--config", str(folder.config)])
    if state.unmeasured:
        missing.append(["fid", str(folder.path), "--every-step", "--protocol", config.protocol, *options])
    if state.final_unmeasured and config.final_protocol is not None:
        missing.append(["fid", str(folder.path), "--protocol", config.final_protocol, *options])
    return missing


def _job(study: Study, state: RunState, fid_options: Sequence[str]) -> Job:
    if not state.trained:
        write_config(state.run)
    return Job(state.run.folder, commands(study, state, fid_options))


def write_config(run: Run) -> None:
    """Writes the recipe of a run to be trained. Raises InputError if another process is working in its folder."""
    folder = RunFolder(run.folder)
    folder.lock()
    try:
        folder.write_config(run.experiment)
    finally:
        folder.unlock()


class _Passes:
    """A study's progress in passes of one image through the network, according to its runs' files."""

    def __init__(self, inventory: Inventory):
        self.states, (self.point, self.final) = inventory.states, inventory.study.sampler_steps
        self.records = {state.run.name: self._count_records(state) for state in self.states}
        self.started = {state.run.folder for state in self.states if state.complete}

    def __call__(self, running: Sequence[Job]) -> tuple[int, int, str]:
        folders = {job.folder for job in running}
        self.started |= folders
        done, total, complete, notes = 0, 0, 0, []
        for state in self.states:
            run, last = state.run, state.run.max_steps
            whole = self._of(state, last, 0, final=True)
            total += whole
            if run.folder in folders:
                step = last if state.trained else logged_step(RunFolder(run.folder).metrics)
                new = self._count_records(state) - self.records[run.name]
                missing = max(0, len(state.unmeasured) - new)
                done += min(self._of(state, step, missing, not state.final_unmeasured), whole - 1)
                points = f"measured {len(run.steps) - missing}/{len(run.steps)}"
                notes.append(f"{run.name} {points if step == last else f'step {step:,}/{last:,}'}")
            elif run.folder in self.started:
                complete += 1
                done += whole
            else:
                done += self._of(state, state.step, len(state.unmeasured), not state.final_unmeasured)
        return done, total, ", ".join([f"{complete} of {len(self.states)} runs", *notes])

    def _of(self, state: RunState, step: int, missing: int, final: bool) -> int:
        """Passes of a run after `step` steps, with `missing` points of its curve not measured."""
        points = len(state.run.steps) - missing
        return PASSES_OF_STEP * step * state.run.batch_size + points * self.point + final * self.final

    @staticmethod
    def _count_records(state: RunState) -> int:
        return count_records(RunFolder(state.run.folder).evaluations)
