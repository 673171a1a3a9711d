"""What a study would take: time and disk, estimated from a few steps and samples of each unit and batch size."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState

from dia_diffusion.sampling.generate import adapt_pipeline, generate
from dia_diffusion.sampling.load import load_guide
from dia_diffusion.sampling.samplers import SamplingSettings
from dia_diffusion.sweeps.collect import Inventory, RunState
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.diffusion import build_model, build_pipeline
from dia_diffusion.training.recipe import override
from dia_diffusion.training.trainer import Trainer

STEPS = 10
"""Timed, at most."""
ENOUGH_SECONDS = 10.0
"""After which fewer steps will do."""
TENSORS_OF_CHECKPOINT = 4
"""Per parameter, float32: itself, its average, and AdamW's two."""


@dataclass(frozen=True)
class Group:
    """The runs of a unit at a batch size, and what they take; seconds are those of one job."""

    states: Sequence[RunState]
    seconds_of_step: float
    """With its share of the sample grids."""
    seconds_of_point: float
    """Of a measurement by the study's protocol."""
    seconds_of_final: float
    """Of one by the final protocol; 0 if there is none."""
    bytes: int
    """On disk, once all its runs are complete."""

    def training_left(self, state: RunState) -> float:
        """Seconds to train what is missing of a run."""
        return state.steps_left * self.seconds_of_step

    def measuring_left(self, state: RunState) -> float:
        """Seconds to measure what is missing of a run."""
        return len(state.unmeasured) * self.seconds_of_point + state.final_unmeasured * self.seconds_of_final


def make_plan(inventory: Inventory, threads: int) -> list[Group]:
    """Times training and sampling steps for each unit and batch size, with this many threads."""
    torch.set_num_threads(threads)
    study, by_group = inventory.study, dict[tuple[str, int], list[RunState]]()
    for state in inventory.states:
        by_group.setdefault((state.run.unit, state.run.batch_size), []).append(state)
    groups = []
    for states in by_group.values():
        run, experiment = states[0].run, states[0].run.experiment
        asked = study.protocol
        sampling = seconds_of_sampler_step(experiment, asked.sampling, asked.precision, asked.guide)
        point, final = (
            0.0 if protocol is None else protocol.num_samples * protocol.sampling.steps * sampling
            for protocol in (study.protocol, study.final_protocol)
        )
        grids = len(run.steps) * experiment.samples.count * experiment.samples.steps * sampling
        step = seconds_of_step(experiment) + grids / run.max_steps
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in build_model(experiment.model).parameters())
        copies = experiment.train.keep_last * TENSORS_OF_CHECKPOINT + len(run.steps)
        disk = len(states) * copies * parameters * torch.float32.itemsize
        groups.append(Group(states, step, point, final, disk))
    return groups


def seconds_of_step(experiment: Experiment) -> float:
    """Of an optimizer step of the trainer on random images."""
    model, count = experiment.model, max(256, 2 * experiment.train.batch_size)
    shape = (count, model.sample_size, model.sample_size, model.in_channels)
    arrays: dict[str, Any] = {"images": np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)}
    if model.num_classes is not None:
        arrays["labels"] = np.arange(count) % model.num_classes
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.npz"
        np.savez(images, **arrays)
        keys: dict[str, Any] = {"output": f"{folder}/run", "init_from": None, "trackers": []}
        AcceleratorState._reset_state()  # a study's variants can differ in precision
        torch.compiler.reset()
        trainer = Trainer(override(experiment, keys | {"data.source": str(images), "data.split": "train"}))

        def seconds(steps: int) -> float:
            started = time.perf_counter()
            losses = [trainer.train_step().loss for _ in range(steps)]
            float(losses[-1])  # waits for the device
            return time.perf_counter() - started

        seconds(2)  # the first compiles
        steps = min(STEPS, int(ENOUGH_SECONDS / seconds(1)) + 1)
        timed = seconds(steps) / steps
        trainer.folder.unlock()
        AcceleratorState._reset_state()
    return timed


def seconds_of_sampler_step(
    experiment: Experiment, settings: SamplingSettings, precision: str, guide: str | None = None
) -> float:
    """Of one of the sampler's steps for an image, many images at once."""
    device, count = ("cuda", 64) if torch.cuda.is_available() else ("cpu", 16)
    pipeline = build_pipeline(experiment, build_model(experiment.model).state_dict(), torch.device(device))
    dtype = getattr(torch, precision)
    pipeline.unet.to(dtype)
    few = replace(settings, steps=min(settings.steps, 8))
    adapted = adapt_pipeline(pipeline, few, None if guide is None else load_guide(guide, device, dtype))
    for _ in range(2):  # the first warms up
        started = time.perf_counter()
        list(generate(adapted, range(count), batch_size=count))
    return (time.perf_counter() - started) / (count * few.steps)
