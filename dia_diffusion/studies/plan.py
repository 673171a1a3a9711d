"""What a study would take, before it is begun: runs, steps, time and disk, estimated from a few steps of each kind."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from dia_diffusion.evaluation.features import FEATURES, build_features
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import read_records
from dia_diffusion.io import write_json
from dia_diffusion.reading import read_json_object
from dia_diffusion.reading.typed import from_json
from dia_diffusion.studies.children import threads_of_each
from dia_diffusion.studies.costs import training_cost
from dia_diffusion.studies.inventory import RunState, inventory
from dia_diffusion.studies.runner import commands
from dia_diffusion.studies.study import Study, StudyRun
from dia_diffusion.studies.timing import (
    machine,
    seconds_of_features,
    seconds_of_pass,
    seconds_of_start,
    seconds_of_step,
    threads,
)
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.diffusion import build_model
from dia_diffusion.training.run_folder import RunFolder

PLAN_FILE = "plan.json"
BYTES_OF_FLOAT = 4
TENSORS_OF_CHECKPOINT = 4
"""A parameter's: itself, its average, and AdamW's two."""
INCEPTION_FEATURES = 2048


@dataclass(frozen=True)
class Group:
    """The runs of a unit at a batch size."""

    unit: str
    batch_size: int
    runs: int
    trained: int
    steps_left: int
    """Of all its runs together, as the numbers below."""
    seconds_of_step: float
    """Measured; the grids that a run draws along the way are its seconds_of_grids."""
    seconds_of_grids: float
    training_seconds: float
    """Of all its runs from their beginning."""
    training_seconds_left: float
    evaluations_left: int
    seconds_of_evaluation: float
    """Of a point of the curve."""
    seconds_of_final: float
    """By the final protocol; 0 without one."""
    evaluation_seconds: float
    evaluation_seconds_left: float


@dataclass(frozen=True)
class Plan:
    """An estimate."""

    study: str
    time: str
    """ISO 8601, UTC."""
    measured_on: str
    cpu_share: float
    """Of the time of measuring, what this process was on a core: below 1, it waited for other work, or for a GPU."""
    side_by_side: int
    groups: list[Group]
    start_seconds_left: float
    """Of the processes, until they begin to work."""
    wall_seconds_left: float
    """With so many runs side by side."""
    bytes: int
    """On disk, of all runs once complete, with the features of measurements under way."""
    bytes_free: int

    @property
    def seconds_left(self) -> float:
        """Of one core or GPU after the other."""
        groups = sum(group.training_seconds_left + group.evaluation_seconds_left for group in self.groups)
        return groups + self.start_seconds_left


def make_plan(study: Study, side_by_side: int, told: Callable[[str], None] = lambda text: None) -> Plan:
    """Measures, and adds up.

    told: is called with what is measured next.

    Raises:
        InputError: records that can't be used.
    """
    states = inventory(study)
    by_group: dict[tuple[str, int], list[RunState]] = {}
    for state in states:
        by_group.setdefault((state.run.unit, state.run.batch_size), []).append(state)
    with threads(threads_of_each(side_by_side)):
        measured_on = machine()
        told("the start of a process")
        start = seconds_of_start()
        sampling, clock = _SamplingTimes(), (time.perf_counter(), time.process_time())
        groups = []
        for (unit, batch_size), members in by_group.items():
            told(f"{unit} at batch size {batch_size}")
            groups.append(_group(study, members, sampling))
        cpu_share = (time.process_time() - clock[1]) / (time.perf_counter() - clock[0])
    starts = {state.run.name: start * len(commands(study, state)) for state in states}
    of_group = {(group.unit, group.batch_size): group for group in groups}
    seconds = [_seconds_left(state, of_group) + starts[state.run.name] for state in states]
    return Plan(
        study=study.name,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        measured_on=measured_on,
        cpu_share=cpu_share,
        side_by_side=side_by_side,
        groups=groups,
        start_seconds_left=sum(starts.values()),
        wall_seconds_left=wall_seconds(seconds, side_by_side),
        bytes=sum(_bytes(run) for run in study.runs) + side_by_side * _bytes_of_features(study),
        bytes_free=shutil.disk_usage(next(p for p in study.folder.absolute().parents if p.is_dir())).free,
    )


def wall_seconds(jobs: Sequence[float], side_by_side: int) -> float:
    """Until the last of jobs that are begun in this order, so many at a time, has ended."""
    slots = [0.0] * side_by_side
    for seconds in jobs:
        first = slots.index(min(slots))
        slots[first] += seconds
    return max(slots)


def write_plan(study: Study, plan: Plan) -> Path:
    """Writes it into the study's folder."""
    path = study.folder / PLAN_FILE
    write_json(path, asdict(plan))
    return path


def read_plan(study: Study) -> Plan | None:
    """The plan in the study's folder; None where there is none, or one of another version."""
    path = study.folder / PLAN_FILE
    try:
        values = read_json_object(path)
        return from_json(Plan, {**values, "groups": [from_json(Group, group) for group in values["groups"]]})
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Taken:
    """What a group's runs took in the end, beside the estimate, in seconds."""

    unit: str
    batch_size: int
    planned_training: float
    training: float
    planned_evaluation: float
    evaluation: float


def set_against(plan: Plan, study: Study) -> list[Taken]:
    """What the plan's groups took, of those whose runs are all complete.

    Raises:
        InputError: records that can't be used.
    """
    found = []
    states = inventory(study)
    for group in plan.groups:
        members = [s for s in states if (s.run.unit, s.run.batch_size) == (group.unit, group.batch_size)]
        costs = [training_cost(state.run) for state in members]
        if len(members) != group.runs or not all(state.complete for state in members):
            continue
        training = sum(cost.seconds for cost in costs if cost is not None)
        evaluation = sum(_evaluation_seconds(study, state.run) for state in members)
        planned = group.training_seconds, group.evaluation_seconds
        found.append(Taken(group.unit, group.batch_size, planned[0], training, planned[1], evaluation))
    return found


def _evaluation_seconds(study: Study, run: StudyRun) -> float:
    names = {study.config.protocol, study.config.final_protocol} - {None}
    protocols = [EvalProtocol.read(name) for name in names if name is not None]
    records = read_records(RunFolder(run.folder).evaluations)
    return sum(record.seconds for record in records if any(protocol.named_in(record) for protocol in protocols))


class _SamplingTimes:
    """Seconds of measurements and grids, each kind of pass measured once a unit."""

    def __init__(self) -> None:
        self._passes: dict[str, float] = {}
        self._features: dict[str, float] = {}

    def grids(self, experiment: Experiment, points: int) -> float:
        samples = experiment.samples
        each = samples.count * samples.steps * self._pass(experiment, "float32", samples.sampler)
        return points * each

    def evaluation(self, experiment: Experiment, protocol: EvalProtocol) -> float:
        if protocol.features not in self._features:
            self._features[protocol.features] = seconds_of_features(protocol, experiment)
        each = protocol.steps * self._pass(experiment, protocol.precision, protocol.sampler)
        return protocol.num_samples * (each + self._features[protocol.features])

    def _pass(self, experiment: Experiment, precision: str, sampler: str) -> float:
        key = str((experiment.model.model_dump(), precision, sampler))
        if key not in self._passes:
            self._passes[key] = seconds_of_pass(experiment, precision, sampler)
        return self._passes[key]


def _group(study: Study, members: Sequence[RunState], sampling: _SamplingTimes) -> Group:
    """Measures for one of a group's runs, and adds up for all."""
    run = members[0].run
    experiment, final = run.experiment, study.config.final_protocol
    step = seconds_of_step(experiment)
    grids = sampling.grids(experiment, len(run.steps))
    point = sampling.evaluation(experiment, EvalProtocol.read(study.config.protocol))
    last = 0.0 if final is None else sampling.evaluation(experiment, EvalProtocol.read(final))
    steps_left = sum(state.steps_left for state in members)
    points_left, finals_left = sum(len(s.unmeasured) for s in members), sum(s.final_unmeasured for s in members)
    steps = experiment.train.max_steps
    return Group(
        unit=run.unit,
        batch_size=run.batch_size,
        runs=len(members),
        trained=sum(state.trained for state in members),
        steps_left=steps_left,
        seconds_of_step=step,
        seconds_of_grids=grids,
        training_seconds=len(members) * (steps * step + grids),
        training_seconds_left=steps_left * (step + grids / steps),
        evaluations_left=points_left + finals_left,
        seconds_of_evaluation=point,
        seconds_of_final=last,
        evaluation_seconds=len(members) * (len(run.steps) * point + last),
        evaluation_seconds_left=points_left * point + finals_left * last,
    )


def _seconds_left(state: RunState, groups: dict[tuple[str, int], Group]) -> float:
    group = groups[state.run.unit, state.run.batch_size]
    steps = state.run.experiment.train.max_steps
    training = state.steps_left * (group.seconds_of_step + group.seconds_of_grids / steps)
    measuring = len(state.unmeasured) * group.seconds_of_evaluation
    return training + measuring + state.final_unmeasured * group.seconds_of_final


def _bytes(run: StudyRun) -> int:
    """Of a run's checkpoints and pipelines."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(run.experiment.model).parameters())
    copies = run.experiment.train.keep_last * TENSORS_OF_CHECKPOINT + len(run.steps)
    return copies * parameters * BYTES_OF_FLOAT


def _bytes_of_features(study: Study) -> int:
    """Of the larger measurement of a run, while it is under way."""
    names = [study.config.protocol, study.config.final_protocol]
    protocols = [EvalProtocol.read(name) for name in names if name is not None]
    return max(protocol.num_samples * _width(protocol) * BYTES_OF_FLOAT for protocol in protocols)


def _width(protocol: EvalProtocol) -> int:
    return build_features(protocol.features).num_features if protocol.features in FEATURES else INCEPTION_FEATURES
