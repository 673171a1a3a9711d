"""Which of a sweep's results exist and which are missing, judging from the runs' files alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.curves import refuse_mixed_protocols
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import EvaluationRecord, read_records
from dia_diffusion.io import step_folders
from dia_diffusion.pipelines.folder import read_training
from dia_diffusion.precision import Precision
from dia_diffusion.sweeps.sweep import Run, Study, resolve_precision
from dia_diffusion.training.checkpoint import newest_state
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.run_folder import RunFolder, read_metrics


@dataclass(frozen=True)
class Point:
    """One distance of one run."""

    unit: str
    """The study's name for the unit or variant."""
    batch_size: int
    seed: int
    step: int
    images_seen: int
    distance: float
    low: float | None
    """Ends of the interval over images, if one was requested; it says nothing about seeds."""
    high: float | None
    run: str
    """The run's folder, relative to the study's."""


@dataclass(frozen=True)
class Measured:
    """A run and a valid record of it."""

    run: Run
    record: EvaluationRecord

    @property
    def step(self) -> int:
        return self.record.step or 0

    @property
    def is_last(self) -> bool:
        """Whether it was measured at the end of the run's training."""
        return self.step == self.run.max_steps

    @property
    def point(self) -> Point:
        run, record = self.run, self.record
        images = self.step * run.batch_size
        return Point(
            run.unit, run.batch_size, run.seed, self.step, images, record.distance, record.low, record.high, run.name
        )


def measured(runs: Sequence[Run], protocol: EvalProtocol) -> list[Measured]:
    """The records under this protocol's name, in order of run and step; the later one counts if a step has two.

    Raises:
        InputError: a record is truncated, of another run, or from a time when the protocol had other settings; or
            records differ in something that the protocol leaves open, such as the reference.
    """
    by_run: dict[str, list[EvaluationRecord]] = {}
    for run in runs:
        records = records_of(run)
        protocol.refuse_changed(records, RunFolder(run.folder).evaluations)
        by_step = {record.step: record for record in records if record.step and protocol.made(record)}
        for record in by_step.values():
            _refuse_another_run(record, run)
        by_run[run.name] = [by_step[step] for step in sorted(by_step)]
    refuse_mixed_protocols(list(by_run.items()))
    return [Measured(run, record) for run in runs for record in by_run[run.name]]


def records_of(run: Run) -> list[EvaluationRecord]:
    """All records of a run, in the order they were made."""
    file = RunFolder(run.folder).evaluations
    return read_records(file) if file.is_file() else []


def _refuse_another_run(record: EvaluationRecord, run: Run) -> None:
    theirs = (record.batch_size, record.seed, record.unit)
    own = (run.batch_size, run.seed, run.experiment.model.attention)
    if theirs != own:
        raise InputError(
            f"{RunFolder(run.folder).evaluations} has a record of batch size {theirs[0]}, seed {theirs[1]} and unit "
            f"{theirs[2]}; the study's run has {own[0]}, {own[1]} and {own[2]}"
        )


@dataclass(frozen=True)
class RunState:
    """The progress of a run."""

    run: Run
    step: int
    """The step from which training would resume; the last step if it is trained."""
    unmeasured: list[int]
    """Steps of its curve without a record."""
    final_unmeasured: bool
    """Whether there is a final protocol, but no record by it at the last step."""
    to_measure: set[int]
    """Steps whose pipelines are still needed."""
    trained: bool
    """Whether these pipelines exist."""

    @property
    def steps_left(self) -> int:
        return self.run.max_steps - self.step

    @property
    def complete(self) -> bool:
        return self.trained and not self.unmeasured and not self.final_unmeasured

    @cached_property
    def origin(self) -> dict[str, Any] | None:
        """Recipe, step and data of its newest checkpoint, or else of its newest pipeline."""
        return origin_of(self.run)


@dataclass(frozen=True)
class Inventory:
    """The state of a study on disk."""

    study: Study
    states: list[RunState]
    curve: list[Measured]
    """Records by the study's protocol."""
    final: list[Measured]
    """Records by its final protocol at the last steps."""

    def on_record(self) -> list[tuple[EvalProtocol, list[Measured]]]:
        """Each protocol with its records."""
        return [*zip(self.study.protocols, (self.curve, self.final), strict=False)]


def scan(study: Study) -> Inventory:
    """Reads the existing output of a study's runs.

    Raises:
        InputError: records can't be used; see `measured`.
    """
    curve, final_protocol = measured(study.runs, study.protocol), study.final_protocol
    final = [] if final_protocol is None else [one for one in measured(study.runs, final_protocol) if one.is_last]
    curve_steps, final_runs = {(one.run.name, one.step) for one in curve}, {one.run.name for one in final}
    states = []
    for run in study.runs:
        folder = RunFolder(run.folder)
        unmeasured = [step for step in run.steps if (run.name, step) not in curve_steps]
        final_unmeasured = final_protocol is not None and run.name not in final_runs
        to_measure = {*unmeasured, *([run.max_steps] if final_unmeasured else [])}
        trained = to_measure <= step_folders(folder.pipelines).keys()
        step = run.max_steps if trained else max(step_folders(folder.checkpoints), default=0)
        states.append(RunState(run, step, unmeasured, final_unmeasured, to_measure, trained))
    return Inventory(study, states, curve, final)


def origin_of(run: Run) -> dict[str, Any] | None:
    """The training record of a run's newest readable checkpoint, else of its newest pipeline; None if there is none."""
    folder = RunFolder(run.folder)
    if (state := newest_state(folder.checkpoints)) is not None:
        return state
    pipelines = step_folders(folder.pipelines)
    return read_training(pipelines[max(pipelines)]) if pipelines else None


def in_one_precision(study: Study) -> tuple[Study, Precision | None]:
    """The study with `mixed_precision: auto` resolved to its runs' precision or, if none exist, the device's best."""
    runs, precision = resolve_precision(study.runs, map(origin_of, study.runs))
    return replace(study, runs=runs), precision


@dataclass(frozen=True)
class Cost:
    """The cost of one complete training."""

    seconds: float
    """Time of the logged steps, without grids, checkpoints and pauses."""
    peak_memory_mib: int | None
    """The GPU's on a GPU, else the process's; None if the run didn't log it."""


def training_cost(run: Run) -> Cost | None:
    """The cost of a run's training according to its metrics.jsonl; None until it is finished."""
    file = RunFolder(run.folder).metrics
    lines = read_metrics(file) if file.is_file() else []
    if not lines or lines[-1]["step"] < last_logged_step(run.experiment):
        return None
    memory = [line["peak_memory_mib"] for line in lines if line.get("peak_memory_mib") is not None]
    return Cost(training_seconds(lines), max(memory, default=None))


def last_logged_step(experiment: Experiment) -> int:
    """The last step of a finished run that has a line in metrics.jsonl."""
    return experiment.train.max_steps // experiment.train.log_every * experiment.train.log_every


def training_seconds(lines: Iterable[dict[str, Any]]) -> float:
    """The time of logged steps, images over rate; a line's rate is for the images since the previous such line."""
    seconds, before = 0.0, 0
    for line in lines:
        if rate := line.get("images_per_second"):  # lines with a distance or a test have none
            seconds += (line["images"] - before) / rate
            before = line["images"]
    return seconds
