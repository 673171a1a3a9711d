"""Trains and measures what a sweep is missing, by commands of this program as child processes."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dia_diffusion.distributed import StopSignal
from dia_diffusion.environment import usable_cores
from dia_diffusion.errors import InputError, RunError, Stopped
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import count_records
from dia_diffusion.sweeps.collect import RunState, inventory, measured
from dia_diffusion.sweeps.sweep import Study, StudyRun, write_study
from dia_diffusion.training.run_folder import RunFolder, logged_step

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


PASSES_OF_STEP = 3
"""What a training step costs an image, in passes through the network: forward, and twice that backward."""


@dataclass(frozen=True)
class Progress:
    """How far a study has come, in passes of an image through a network."""

    done: int
    total: int
    note: str
    """Runs that are complete, and those under way."""


def run_study(study: Study, side_by_side: int, watch: Callable[[Progress], None]) -> None:
    """Trains and measures what is missing, so many runs at a time; the caller holds the lock of the study's folder.

    A run's training and its measurements are one job; each run's folder gets its recipe and the commands' logs.

    Raises:
        InputError, RunError, Stopped: see `run_jobs`; what is finished stays, and the same call goes on.
        InputError: a run is in use by another process, as by one that outlived an earlier study; or what a run was
            measured by can't share a curve with the others, which are then stopped.
    """
    write_study(study)
    states = inventory(study)
    jobs = {state.run.folder: _job(study, state) for state in states if not state.complete}
    progress = _Watch(study, states)
    complete = [state.run for state in states if state.complete]

    def check(job: Job) -> None:
        complete.append(next(run for run in study.runs if run.folder == job.folder))
        for protocol in filter(None, (study.config.protocol, study.config.final_protocol)):
            measured(replace(study, runs=complete), protocol)  # of no run that is being written to

    run_jobs(list(jobs.values()), side_by_side, lambda running: watch(progress(running)), check)


def commands(study: Study, state: RunState) -> list[list[str]]:
    """What completes a run, as it would be typed after `dia-diffusion`."""
    folder, config = RunFolder(state.run.folder), study.config
    reference = [] if config.reference is None else ["--reference", config.reference]
    found = []
    if not state.trained:
        found.append(["train", "--config", str(folder.config)])
    if state.unmeasured:
        found.append(["fid", str(folder.path), "--every-step", "--protocol", config.protocol, *reference])
    if state.final_unmeasured and config.final_protocol is not None:
        found.append(["fid", str(folder.path), "--protocol", config.final_protocol, *reference])
    return found


def _job(study: Study, state: RunState) -> Job:
    if not state.trained:
        folder = RunFolder(state.run.folder)
        folder.lock()
        try:
            folder.write_config(state.run.experiment)
        finally:
            folder.unlock()
    return Job(state.run.folder, commands(study, state))


class _Watch:
    """Adds up how far the runs have come."""

    def __init__(self, study: Study, states: Sequence[RunState]):
        self.states = states
        final = study.config.final_protocol
        self.point, self.final = passes(EvalProtocol.read(study.config.protocol)), 0
        if final is not None:
            self.final = passes(EvalProtocol.read(final))
        self.records_before = {s.run.name: count_records(RunFolder(s.run.folder).evaluations) for s in states}
        self.started = {state.run.name for state in states if state.complete}

    def __call__(self, running: Sequence[Job]) -> Progress:
        under_way = {job.folder for job in running}
        done, total, complete, notes = 0, 0, 0, []
        for state in self.states:
            run = state.run
            of_run = self._passes(run, run.experiment.train.max_steps, len(run.steps), True)
            total += of_run
            if run.folder in under_way:
                self.started.add(run.name)
                passed, note = self._so_far(state)
                notes.append(note)
                done += min(passed, of_run - 1)  # until it has ended
            elif run.name in self.started:
                complete += 1
                done += of_run
            else:
                measured = len(run.steps) - len(state.unmeasured)
                done += self._passes(run, state.step, measured, not state.final_unmeasured)
        return Progress(done, total, ", ".join([f"{complete} of {len(self.states)} runs", *notes]))

    def _so_far(self, state: RunState) -> tuple[int, str]:
        """Passes of a run under way, and what it does."""
        run, folder = state.run, RunFolder(state.run.folder)
        last = run.experiment.train.max_steps
        step = last if state.trained else logged_step(folder.metrics)
        new = count_records(folder.evaluations) - self.records_before[run.name]
        points = len(run.steps) - len(state.unmeasured) + min(new, len(state.unmeasured))
        done = self._passes(run, step, points, not state.final_unmeasured)
        if step < last:
            return done, f"{run.name} step {step:,}/{last:,}"
        return done, f"{run.name} measured {points}/{len(run.steps)}"

    def _passes(self, run: StudyRun, step: int, points: int, final: bool) -> int:
        return PASSES_OF_STEP * step * run.batch_size + points * self.point + final * self.final


def passes(protocol: EvalProtocol) -> int:
    """Of images through the network, for one measurement."""
    return protocol.num_samples * protocol.steps
