"""What a study would take: steps, hours and disk, estimated from a few steps and samples of each unit."""

import heapq
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState

from dia_diffusion.evaluation.features import PACKAGED, build_features
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.io import write_json
from dia_diffusion.reading import read_json_object
from dia_diffusion.sampling.generate import adapt_pipeline, generate
from dia_diffusion.sampling.samplers import SamplingSettings
from dia_diffusion.sweeps.collect import Inventory, RunState, records_of, training_cost
from dia_diffusion.sweeps.launcher import commands, threads_per_job
from dia_diffusion.sweeps.sweep import Run, Study
from dia_diffusion.training.callbacks import Callback
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.diffusion import build_model, build_pipeline
from dia_diffusion.training.recipe import override
from dia_diffusion.training.trainer import StepResult, Trainer
from dia_diffusion.validation import Strict

PLAN_FILE = "plan.json"
STEPS = 10
"""Timed, after as many to warm up."""
ENOUGH_SECONDS = 20.0
"""After which fewer steps will do."""
SAMPLER_STEPS = 4
IMAGES_AT_ONCE = {"cpu": 16, "cuda": 64}
BYTES_OF_FLOAT = 4
TENSORS_OF_CHECKPOINT = 4
"""Per parameter: itself, its average, and AdamW's two."""
INCEPTION_FEATURES = 2048


class Group(Strict):
    """The runs of a unit at a batch size; seconds_of_... are of one step, run or measurement, others of all runs."""

    unit: str
    batch_size: int
    runs: int
    trained: int
    steps_left: int
    seconds_of_step: float
    seconds_of_grids: float
    training_seconds: float
    training_seconds_left: float
    evaluations_left: int
    seconds_of_evaluation: float
    seconds_of_final: float
    evaluation_seconds: float
    evaluation_seconds_left: float


class Plan(Strict):
    """An estimate."""

    study: str
    time: str
    """ISO 8601, UTC."""
    measured_on: str
    cpu_share: float
    """Of a core, while measuring: below 1, other work was running, or a GPU was waited for."""
    side_by_side: int
    """Jobs at a time."""
    groups: list[Group]
    start_seconds_left: float
    """Of processes until they begin to work."""
    wall_seconds_left: float
    bytes: int
    """On disk, of all runs once complete, with the features of measurements under way."""
    bytes_free: int

    @property
    def seconds_left(self) -> float:
        """Of one core or GPU after the other."""
        groups = sum(group.training_seconds_left + group.evaluation_seconds_left for group in self.groups)
        return groups + self.start_seconds_left


def make_plan(inventory: Inventory, max_parallel: int, progress: Callable[[str], None] = lambda text: None) -> Plan:
    """Times each group of runs, and adds up.

    progress: called with what is measured next.
    """
    study, times = inventory.study, dict[str, float]()
    by_group: dict[tuple[str, int], list[RunState]] = {}
    for state in inventory.states:
        by_group.setdefault((state.run.unit, state.run.batch_size), []).append(state)
    groups: dict[tuple[str, int], Group] = {}
    jobs = []
    with threads(threads_per_job(max_parallel)):
        progress("the start of a process")
        start, clock = seconds_of_start(), (time.perf_counter(), time.process_time())
        for (unit, batch_size), states in by_group.items():
            progress(f"{unit} at batch size {batch_size}")
            groups[unit, batch_size] = _group(study, states, times)
        cpu_share = (time.process_time() - clock[1]) / (time.perf_counter() - clock[0])
        measured_on = _machine()
    starts = [start * len(commands(study, state)) for state in inventory.states]
    for state, starting in zip(inventory.states, starts, strict=True):
        group = groups[state.run.unit, state.run.batch_size]
        training = state.steps_left * (group.seconds_of_step + group.seconds_of_grids / state.run.max_steps)
        measuring = len(state.unmeasured) * group.seconds_of_evaluation
        jobs.append(training + measuring + state.final_unmeasured * group.seconds_of_final + starting)
    return Plan(
        study=study.name,
        time=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        measured_on=measured_on,
        cpu_share=cpu_share,
        side_by_side=max_parallel,
        groups=list(groups.values()),
        start_seconds_left=float(sum(starts)),
        wall_seconds_left=wall_seconds(jobs, max_parallel),
        bytes=sum(_bytes(run) for run in study.runs) + max_parallel * max(map(_bytes_of_features, study.protocols)),
        bytes_free=shutil.disk_usage(next(p for p in study.folder.absolute().parents if p.is_dir())).free,
    )


def _group(study: Study, states: Sequence[RunState], times: dict[str, float]) -> Group:
    """Times one of a group's runs, and adds up for all; `times` of samples and features are shared between groups."""
    run, count = states[0].run, len(states)
    experiment, samples = run.experiment, run.experiment.samples

    def seconds_per_image(precision: str, sampler: str, steps: int) -> float:
        key = str((experiment.model.model_dump(), precision, sampler))
        if key not in times:
            times[key] = seconds_of_pass(experiment, precision, sampler)
        return steps * times[key]

    def evaluation(protocol: EvalProtocol) -> float:
        if protocol.features not in times:
            times[protocol.features] = seconds_of_features(protocol, experiment)
        sampling = seconds_per_image(protocol.precision, protocol.sampler, protocol.steps)
        return protocol.num_samples * (sampling + times[protocol.features])

    step = seconds_of_step(experiment)
    grids = len(run.steps) * samples.count * seconds_per_image("float32", samples.sampler, samples.steps)
    point = evaluation(study.protocol)
    final = 0.0 if study.final_protocol is None else evaluation(study.final_protocol)
    steps_left = sum(state.steps_left for state in states)
    points_left, finals_left = sum(len(s.unmeasured) for s in states), sum(s.final_unmeasured for s in states)
    return Group(
        unit=run.unit,
        batch_size=run.batch_size,
        runs=count,
        trained=sum(state.trained for state in states),
        steps_left=steps_left,
        seconds_of_step=step,
        seconds_of_grids=grids,
        training_seconds=count * (run.max_steps * step + grids),
        training_seconds_left=steps_left * (step + grids / run.max_steps),
        evaluations_left=points_left + finals_left,
        seconds_of_evaluation=point,
        seconds_of_final=final,
        evaluation_seconds=count * (len(run.steps) * point + final),
        evaluation_seconds_left=points_left * point + finals_left * final,
    )


def wall_seconds(jobs: Iterable[float], max_parallel: int) -> float:
    """Until the last of jobs that are started in this order, `max_parallel` at a time, has ended."""
    slots = [0.0] * max_parallel
    for seconds in jobs:
        heapq.heapreplace(slots, slots[0] + seconds)
    return max(slots)


def _bytes(run: Run) -> int:
    """Of a run's checkpoints and pipelines."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(run.experiment.model).parameters())
    copies = run.experiment.train.keep_last * TENSORS_OF_CHECKPOINT + len(run.steps)
    return copies * parameters * BYTES_OF_FLOAT


def _bytes_of_features(protocol: EvalProtocol) -> int:
    own = protocol.features in PACKAGED
    width = build_features(protocol.features).num_features if own else INCEPTION_FEATURES
    return protocol.num_samples * width * BYTES_OF_FLOAT


def write_plan(study: Study, plan: Plan) -> Path:
    """Writes it into the study's folder."""
    path = study.folder / PLAN_FILE
    write_json(path, plan.model_dump())
    return path


def read_plan(study: Study) -> Plan | None:
    """The plan in the study's folder; None if there is none, or none that can be read."""
    try:
        return Plan.model_validate(read_json_object(study.folder / PLAN_FILE))
    except (OSError, ValueError):
        return None


def compare_with_plan(plan: Plan, inventory: Inventory) -> list[dict[str, Any]]:
    """What the runs of each complete group took, in seconds, beside what was planned."""
    taken = []
    for group in plan.groups:
        states = [s for s in inventory.states if (s.run.unit, s.run.batch_size) == (group.unit, group.batch_size)]
        costs = [training_cost(state.run) for state in states]
        if len(states) == group.runs and all(state.complete for state in states):
            records = [record for state in states for record in records_of(state.run)]
            measured = [r for r in records if any(protocol.named_in(r) for protocol in inventory.study.protocols)]
            taken.append(
                {
                    "unit": group.unit,
                    "batch_size": group.batch_size,
                    "planned_training": group.training_seconds,
                    "training": sum(cost.seconds for cost in costs if cost),
                    "planned_evaluation": group.evaluation_seconds,
                    "evaluation": sum(record.seconds for record in measured),
                }
            )
    return taken


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Lets torch use this many cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _machine() -> str:
    if torch.cuda.is_available():
        return f"one {torch.cuda.get_device_name()}"
    return f"CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''} a run"


def seconds_of_start() -> float:
    """Of a process of this program, before it does anything."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import dia_diffusion.training.trainer"], check=True)
    return time.perf_counter() - started


class _Enough(Exception):
    """Enough steps are timed."""


class _Clock(Callback):
    """Times steps, and ends the run after enough of them."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, trainer: Trainer, result: StepResult) -> None:
        self.times.append(time.perf_counter())
        if trainer.step == 2 * STEPS or (trainer.step >= 2 and self.times[-1] - self.times[0] > ENOUGH_SECONDS):
            raise _Enough


def seconds_of_step(experiment: Experiment) -> float:
    """Of an optimizer step of the real training loop, on random images, without grids and checkpoints."""
    model, count = experiment.model, max(256, 2 * experiment.train.batch_size)
    shape = (count, model.sample_size, model.sample_size, model.in_channels)
    arrays: dict[str, Any] = {"images": np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)}
    if model.num_classes is not None:
        arrays["labels"] = np.arange(count) % model.num_classes
    with tempfile.TemporaryDirectory() as folder:
        images, clock = Path(folder) / "images.npz", _Clock()
        np.savez(images, **arrays)
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
        AcceleratorState._reset_state()  # a study's variants can differ in precision
        torch.compiler.reset()
        with suppress(_Enough):
            Trainer(override(experiment, keys), callbacks=[clock]).run()
        AcceleratorState._reset_state()
    first = min(STEPS, len(clock.times) // 2)
    return (clock.times[-1] - clock.times[first]) / (len(clock.times) - 1 - first)


def seconds_of_pass(experiment: Experiment, precision: str, sampler: str) -> float:
    """Of an image through the network, while sampling many at once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = build_pipeline(experiment, build_model(experiment.model).state_dict(), torch.device(device))
    pipeline.unet.to(getattr(torch, precision))
    classes = None if experiment.model.num_classes is None else (0,)
    adapted, count = adapt_pipeline(pipeline, SamplingSettings(sampler, SAMPLER_STEPS, classes)), IMAGES_AT_ONCE[device]
    return _second_time(lambda: list(generate(adapted, range(count), batch_size=count))) / (count * SAMPLER_STEPS)


def seconds_of_features(protocol: EvalProtocol, experiment: Experiment) -> float:
    """Of an image's features if they are the package's; 0 for others, which take long to load or a download."""
    if protocol.features not in PACKAGED:
        return 0.0
    extractor = build_features(protocol.features, "cuda" if torch.cuda.is_available() else "cpu")
    model = experiment.model
    images = torch.zeros(64, model.in_channels, model.sample_size, model.sample_size, dtype=torch.uint8)
    return _second_time(lambda: extractor(images).cpu()) / len(images)


def _second_time(measured: Callable[[], object]) -> float:
    """Seconds of a call after one to warm up."""
    measured()
    started = time.perf_counter()
    measured()
    return time.perf_counter() - started
