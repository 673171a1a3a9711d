"""The cost of a study in time and disk, estimated from a few steps and samples of each unit and batch size."""

import tempfile
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate.state import AcceleratorState

from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.sampling.generate import adapt_pipeline, generate
from dia_diffusion.sampling.load import load_guide
from dia_diffusion.sweeps.collect import Inventory, RunState
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.diffusion import build_model, build_pipeline
from dia_diffusion.training.recipe import override
from dia_diffusion.training.trainer import Trainer

STEPS, ENOUGH_SECONDS = 10, 10.0  # steps to time, and the seconds after which fewer are enough
TENSORS_OF_CHECKPOINT = 4  # per parameter: the weight, its average, and AdamW's two moments


@dataclass(frozen=True)
class Group:
    """The runs of a unit at a batch size, and their cost as a single job."""

    states: list[RunState]
    seconds_of_step: float
    """Includes the step's share of the sample grids."""
    seconds_left: list[tuple[float, float]]
    """For each run: seconds to finish training, and to measure what is missing."""
    bytes: int
    """Disk space once all its runs are complete."""


def make_plan(inventory: Inventory, threads: int) -> list[Group]:
    """Times training and sampling steps for each unit and batch size, with this many threads."""
    torch.set_num_threads(threads)
    by_group: dict[tuple[str, int], list[RunState]] = {}
    for state in inventory.states:
        by_group.setdefault((state.run.unit, state.run.batch_size), []).append(state)
    groups = []
    for states in by_group.values():
        run, experiment = states[0].run, states[0].run.experiment
        sampler_step = seconds_of_sampler_step(experiment, inventory.study.protocol)
        grids = len(run.steps) * experiment.samples.count * experiment.samples.steps * sampler_step
        step = seconds_of_step(experiment) + grids / run.max_steps
        point, final = (count * sampler_step for count in inventory.study.sampler_steps)
        left = [(s.steps_left * step, len(s.unmeasured) * point + s.final_unmeasured * final) for s in states]
        copies = experiment.train.keep_last * TENSORS_OF_CHECKPOINT + len(run.steps)
        with torch.device("meta"):
            one = sum(parameter.nbytes for parameter in build_model(experiment.model).parameters())
        groups.append(Group(states, step, left, len(states) * copies * one))
    return groups


def seconds_of_step(experiment: Experiment) -> float:
    """Seconds of one of the trainer's optimizer steps, on random images."""
    AcceleratorState._reset_state()  # a study's variants can differ in precision
    torch.compiler.reset()
    model, count = experiment.model, max(256, 2 * experiment.train.batch_size)
    pixels = np.random.default_rng(0).integers(0, 256, (count, model.sample_size, model.sample_size, model.in_channels))
    with tempfile.TemporaryDirectory() as folder:
        source = f"{folder}/images.npz"
        np.savez(source, images=pixels.astype(np.uint8), labels=np.arange(count) % (model.num_classes or 1))
        keys = {"data.source": source, "data.split": "train", "output": f"{folder}/run"}
        trainer = Trainer(override(experiment, {**keys, "init_from": None, "trackers": []}))
        trainer.folder.unlock()

        def seconds(steps: int) -> float:
            started = time.perf_counter()
            losses = [trainer.train_step().loss for _ in range(steps)]
            float(losses[-1])  # waits for the device
            return (time.perf_counter() - started) / steps

        seconds(2)  # the first step compiles
        return seconds(min(STEPS, int(ENOUGH_SECONDS / seconds(1)) + 1))


def seconds_of_sampler_step(experiment: Experiment, protocol: EvalProtocol) -> float:
    """Seconds per image of one sampler step, with many images at once."""
    device, count = ("cuda", 64) if torch.cuda.is_available() else ("cpu", 16)
    pipeline = build_pipeline(experiment, build_model(experiment.model).state_dict(), torch.device(device))
    dtype = getattr(torch, protocol.precision)
    pipeline.unet.to(dtype)
    few = replace(protocol.sampling, steps=min(protocol.steps, 8))
    guide = load_guide(protocol.guide, device, dtype)
    adapted = adapt_pipeline(pipeline, few, guide)
    for _ in range(2):  # the first is a warm-up
        started = time.perf_counter()
        list(generate(adapted, range(count), batch_size=count))
    return (time.perf_counter() - started) / (count * few.steps)
