"""What a study would take: steps, hours and disk, estimated from a few steps of each kind."""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState

from dia_diffusion.evaluation.features import FEATURES, build_features
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import read_records
from dia_diffusion.io import write_json
from dia_diffusion.reading import read_json_object
from dia_diffusion.reading.typed import from_json
from dia_diffusion.sampling.generate import adapt_pipeline, generate
from dia_diffusion.sampling.samplers import SamplingSettings
from dia_diffusion.sweeps.collect import RunState, inventory, training_cost
from dia_diffusion.sweeps.launcher import commands, threads_of_each
from dia_diffusion.sweeps.sweep import Study, StudyRun
from dia_diffusion.training.callbacks import Callback
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.diffusion import build_model, build_pipeline
from dia_diffusion.training.recipe import override
from dia_diffusion.training.run_folder import RunFolder
from dia_diffusion.training.trainer import StepResult, Trainer

STEPS = 10
"""Timed, after as many to warm up."""
ENOUGH_SECONDS = 20.0
"""From which fewer steps will do."""
SAMPLER_STEPS = 4
IMAGES_AT_ONCE = {"cpu": 16, "cuda": 64}


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Lets torch use so many cores within."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine() -> str:
    """What is measured on."""
    if torch.cuda.is_available():
        return f"one {torch.cuda.get_device_name()}"
    return f"CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''} a run"


def seconds_of_start() -> float:
    """Of a process of this program, before it does anything."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import dia_diffusion.training.trainer"], check=True)
    return time.perf_counter() - started


def seconds_of_step(experiment: Experiment) -> float:
    """Of an optimizer step, grids and checkpoints left out."""
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.npz"
        _write_images(experiment, images)
        keys: dict[str, Any] = {
            "output": str(Path(folder) / "run"),
            "init_from": None,
            "trackers": [],
            "data.source": str(images),
            "data.split": "train",
            "train.max_steps": 2 * STEPS + 1,
            # What a line logs is read from the device, so that the clock is that of finished steps.
            "train.log_every": STEPS,
            "train.sample_every": 0,
        }
        trial = override(experiment, keys)
        AcceleratorState._reset_state()  # a study's variants can differ in precision
        torch.compiler.reset()
        clock = _Clock()
        with suppress(_Enough):
            Trainer(trial, callbacks=[clock]).run()
        AcceleratorState._reset_state()
        return clock.seconds_of_step()


def seconds_of_pass(experiment: Experiment, precision: str, sampler: str) -> float:
    """Of an image through the network, while sampling many at once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = build_pipeline(experiment, build_model(experiment.model).state_dict(), torch.device(device))
    pipeline.unet.to(getattr(torch, precision))
    classes = None if experiment.model.num_classes is None else (0,)
    adapted, count = adapt_pipeline(pipeline, SamplingSettings(sampler, SAMPLER_STEPS, classes)), IMAGES_AT_ONCE[device]
    for _ in range(2):  # the first to warm up
        started = time.perf_counter()
        list(generate(adapted, range(count), batch_size=count))
        seconds = time.perf_counter() - started
    return seconds / (count * SAMPLER_STEPS)


def seconds_of_features(protocol: EvalProtocol, experiment: Experiment) -> float:
    """Of an image's features, where they are the package's; 0 for others, which take long to load or a download."""
    if protocol.features not in FEATURES:
        return 0.0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extractor, model = build_features(protocol.features, device), experiment.model
    images = torch.zeros(64, model.in_channels, model.sample_size, model.sample_size, dtype=torch.uint8)
    for _ in range(2):
        started = time.perf_counter()
        extractor(images).cpu()
        seconds = time.perf_counter() - started
    return seconds / len(images)


class _Enough(Exception):
    """Enough steps are timed."""


class _Clock(Callback):
    """Notes when steps end, and ends the run after enough of them."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, trainer: Trainer, result: StepResult) -> None:
        self.times.append(time.perf_counter())
        if trainer.step == 2 * STEPS or (trainer.step >= 2 and self.times[-1] - self.times[0] > ENOUGH_SECONDS):
            raise _Enough

    def seconds_of_step(self) -> float:
        first = min(STEPS, len(self.times) // 2)
        return (self.times[-1] - self.times[first]) / (len(self.times) - 1 - first)


def _write_images(experiment: Experiment, path: Path) -> None:
    """Noise of the right shape and with the right classes, as many images as two batches and no fewer than 256."""
    model, random = experiment.model, np.random.default_rng(0)
    count = max(256, 2 * experiment.train.batch_size)
    shape = (count, model.sample_size, model.sample_size, model.in_channels)
    arrays: dict[str, np.ndarray] = {"images": random.integers(0, 256, shape, dtype=np.uint8)}
    if model.num_classes is not None:
        arrays["labels"] = np.arange(count) % model.num_classes
    np.savez(path, **arrays)  # type: ignore[arg-type]


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
