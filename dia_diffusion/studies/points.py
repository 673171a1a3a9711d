"""A study's points: the distances on record of its runs, by one protocol."""

from dataclasses import dataclass

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.curves import refuse_mixed_protocols
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import EvaluationRecord, read_records
from dia_diffusion.studies.study import Study, StudyRun
from dia_diffusion.training.run_folder import RunFolder


@dataclass(frozen=True)
class Point:
    """One distance of one run."""

    unit: str
    """The study's name for it, be it a variant's."""
    batch_size: int
    seed: int
    step: int
    images_seen: int
    distance: float
    low: float | None
    """The ends of the interval over images, where one was asked for; seeds are no part of it."""
    high: float | None
    run: str
    """The run's folder within the study's."""


@dataclass(frozen=True)
class Measured:
    """A run's record that counts."""

    run: StudyRun
    record: EvaluationRecord

    @property
    def is_last(self) -> bool:
        """Whether it is of the end of the run's training."""
        return self.record.step == self.run.experiment.train.max_steps

    @property
    def point(self) -> Point:
        run, record = self.run, self.record
        step = record.step or 0
        images = step * run.batch_size
        return Point(
            run.unit, run.batch_size, run.seed, step, images, record.distance, record.low, record.high, run.name
        )


def collect(study: Study) -> list[Point]:
    """The points of the curves: one a run and step that is on record under the study's protocol, in the runs' order.

    Raises:
        InputError: as `measured`.
    """
    return [one.point for one in measured(study, study.config.protocol)]


def measured(study: Study, protocol: str) -> list[Measured]:
    """The records under this protocol's name, in order of run and step; of two of one step the later counts.

    Raises:
        InputError: a record that is truncated, of another run, or made when the protocol had other settings; or records
            that differ in what the protocol leaves open, such as the reference.
    """
    named = EvalProtocol.read(protocol)
    found: dict[str, list[EvaluationRecord]] = {}
    for run in study.runs:
        file = RunFolder(run.folder).evaluations
        records = read_records(file) if file.is_file() else []
        named.refuse_changed(records, file)
        by_step = {record.step: record for record in records if record.step and named.named_in(record)}
        for record in by_step.values():
            _refuse_another_run(record, run)
        found[run.name] = [by_step[step] for step in sorted(by_step)]
    refuse_mixed_protocols(list(found.items()))
    return [Measured(run, record) for run in study.runs for record in found[run.name]]


def _refuse_another_run(record: EvaluationRecord, run: StudyRun) -> None:
    theirs = (record.batch_size, record.seed, record.unit)
    own = (run.batch_size, run.seed, run.experiment.model.attention)
    if theirs != own:
        raise InputError(
            f"{RunFolder(run.folder).evaluations} has a record of batch size {theirs[0]}, seed {theirs[1]} and unit "
            f"{theirs[2]}; the study's run has {own[0]}, {own[1]} and {own[2]}"
        )
