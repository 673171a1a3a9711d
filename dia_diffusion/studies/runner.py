"""Trains and measures what a study is missing, by the very commands that a person would type."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import count_records
from dia_diffusion.studies.children import Job, run_jobs
from dia_diffusion.studies.inventory import RunState, inventory
from dia_diffusion.studies.points import measured
from dia_diffusion.studies.study import Study, StudyRun, write_study
from dia_diffusion.training.run_folder import RunFolder, logged_step

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
