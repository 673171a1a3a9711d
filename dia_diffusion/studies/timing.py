"""How long steps, samples and features take here: measured on a few, on random images, by the code that a run uses."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState

from dia_diffusion.evaluation.features import FEATURES, build_features
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.sampling.generate import adapt_pipeline, generate
from dia_diffusion.sampling.samplers import SamplingSettings
from dia_diffusion.training.callbacks import Callback
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.diffusion import build_model, build_pipeline
from dia_diffusion.training.recipe import override
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
