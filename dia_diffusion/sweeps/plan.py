"""What a study would take: steps, hours and disk, estimated from a few steps and samples of each group of runs."""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate.state import AcceleratorState

from dia_diffusion.evaluation.features import PACKAGED, build_features
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.sampling.generate import adapt_pipeline, generate
from dia_diffusion.sampling.load import load_guide
from dia_diffusion.sampling.samplers import SamplingSettings
from dia_diffusion.sweeps.collect import Inventory, RunState
from dia_diffusion.training.callbacks import Callback
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.diffusion import build_model, build_pipeline, sampling_settings
from dia_diffusion.training.recipe import override
from dia_diffusion.training.trainer import StepResult, Trainer

STEPS = 10
"""Timed, after as many to warm up."""
ENOUGH_SECONDS = 20.0
"""After which fewer steps will do."""
SAMPLER_STEPS = 8
"""At most, of the sampler that is timed."""
TENSORS_OF_CHECKPOINT = 4
"""Per parameter, float32: itself, its average, and AdamW's two."""


@dataclass(frozen=True)
class Group:
    """The runs of a unit at a batch size, and the seconds that one step, or one measurement, takes."""

    states: Sequence[RunState]
    seconds_of_step: float
    seconds_of_grids: float
    """The share of each step in the sample grids."""
    seconds_of_point: float
    seconds_of_final: float
    """Of a measurement by the final protocol; 0 if there is none."""
    bytes: int
    """On disk, once all its runs are complete."""

    def training_left(self, states: Sequence[RunState]) -> float:
        """Seconds to train what is missing of these runs."""
        return sum(state.steps_left for state in states) * (self.seconds_of_step + self.seconds_of_grids)

    def measuring_left(self, states: Sequence[RunState]) -> float:
        """Seconds to measure what is missing of these runs."""
        finals = sum(state.final_unmeasured for state in states) * self.seconds_of_final
        return sum(len(state.unmeasured) for state in states) * self.seconds_of_point + finals


@dataclass(frozen=True)
class Plan:
    """An estimate; seconds of one job at a time."""

    groups: Sequence[Group]
    bytes_free: int
    busy: bool
    """Whether other work wanted the same cores meanwhile."""

    @property
    def seconds_left(self) -> list[float]:
        """Of each run."""
        return [g.training_left([state]) + g.measuring_left([state]) for g in self.groups for state in g.states]

    @property
    def bytes(self) -> int:
        return sum(group.bytes for group in self.groups)


def make_plan(inventory: Inventory, threads: int, measuring: Callable[[str], None] = lambda text: None) -> Plan:
    """Times a step, a sampled image and its features for each unit and batch size, with this many threads.

    measuring: called with what is timed next.
    """
    torch.set_num_threads(threads)
    study, known = inventory.study, dict[str, float]()
    by_group: dict[tuple[str, int], list[RunState]] = {}
    for state in inventory.states:
        by_group.setdefault((state.run.unit, state.run.batch_size), []).append(state)

    def once(key: str, timed: Callable[[], float]) -> float:
        return known[key] if key in known else known.setdefault(key, timed())

    def image(experiment: Experiment, settings: SamplingSettings, precision: str, guide: str | None = None) -> float:
        key = f"{experiment.model.model_dump()} {settings} {precision} {guide}"
        return once(key, lambda: seconds_of_image(experiment, settings, precision, guide))

    def measurement(experiment: Experiment, protocol: EvalProtocol | None) -> float:
        if protocol is None:
            return 0.0
        features = once(protocol.features, lambda: seconds_of_features(protocol, experiment))
        seconds = image(experiment, protocol.sampling, protocol.precision, protocol.guide)
        return protocol.num_samples * (seconds + features)

    groups, started, work = [], time.monotonic(), _work_of_others()
    for (unit, batch_size), states in by_group.items():
        measuring(f"{unit} at batch size {batch_size}")
        run, experiment = states[0].run, states[0].run.experiment
        grids = len(run.steps) * experiment.samples.count * image(experiment, sampling_settings(experiment), "float32")
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in build_model(experiment.model).parameters())
        copies = experiment.train.keep_last * TENSORS_OF_CHECKPOINT + len(run.steps)
        groups.append(
            Group(
                states,
                seconds_of_step(experiment),
                grids / run.max_steps,
                measurement(experiment, study.protocol),
                measurement(experiment, study.final_protocol),
                len(states) * copies * parameters * torch.float32.itemsize,
            )
        )
    others = (_work_of_others() - work) / (time.monotonic() - started)
    free = shutil.disk_usage(next(p for p in study.folder.absolute().parents if p.is_dir())).free
    return Plan(groups, free, busy=others + threads > (psutil.cpu_count() or 1) + 0.2)


def _work_of_others() -> float:
    """CPU seconds that other processes of this machine have used so far."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - time.process_time()


class _Enough(Exception):
    """Enough steps are timed."""


class _Clock(Callback):
    """Times steps, and ends the run after enough of them."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, trainer: Trainer, result: StepResult) -> None:
        self.times.append(time.perf_counter())
        if trainer.step == 2 * STEPS or (trainer.step > 2 and self.times[-1] - self.times[0] > ENOUGH_SECONDS):
            raise _Enough


def seconds_of_step(experiment: Experiment) -> float:
    """Of an optimizer step of the real training loop, on random images, without grids and checkpoints."""
    model, count = experiment.model, max(256, 2 * experiment.train.batch_size)
    shape = (count, model.sample_size, model.sample_size, model.in_channels)
    arrays: dict[str, Any] = {"images": np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)}
    if model.num_classes is not None:
        arrays["labels"] = np.arange(count) % model.num_classes
    steps = max(experiment.train.max_steps, 2 * STEPS + 1)  # a long run is compiled, and the clock ends it
    with tempfile.TemporaryDirectory() as folder:
        images, clock = Path(folder) / "images.npz", _Clock()
        np.savez(images, **arrays)
        keys: dict[str, Any] = {
            "output": str(Path(folder) / "run"),
            "init_from": None,
            "trackers": [],
            "data.source": str(images),
            "data.split": "train",
            "train.max_steps": steps,
            # What a line logs is read from the device, so that the clock is that of finished steps.
            "train.log_every": STEPS,
            "train.sample_every": 0,
            "train.checkpoint_every": steps,
        }
        AcceleratorState._reset_state()  # a study's variants can differ in precision
        torch.compiler.reset()
        with suppress(_Enough):
            Trainer(override(experiment, keys), callbacks=[clock]).run()
        AcceleratorState._reset_state()
    first = min(STEPS, len(clock.times) // 2) - 1
    return (clock.times[-1] - clock.times[first]) / (len(clock.times) - 1 - first)


def seconds_of_image(
    experiment: Experiment, settings: SamplingSettings, precision: str, guide: str | None = None
) -> float:
    """Of a sampled image, by a few of its steps, many images at once."""
    device, count = ("cuda", 64) if torch.cuda.is_available() else ("cpu", 16)
    pipeline = build_pipeline(experiment, build_model(experiment.model).state_dict(), torch.device(device))
    dtype = getattr(torch, precision)
    pipeline.unet.to(dtype)
    few = replace(settings, steps=min(settings.steps, SAMPLER_STEPS))
    adapted = adapt_pipeline(pipeline, few, None if guide is None else load_guide(guide, device, dtype))
    seconds = _second_time(lambda: list(generate(adapted, range(count), batch_size=count)))
    return seconds / count * settings.steps / few.steps


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
