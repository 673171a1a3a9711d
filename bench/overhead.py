"""Overheads: the unit, feeding images, and splitting a batch over processes."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from steps import COMPILED, OURS, Setting, experiment_of, made_up_images, own_step
from timing import STEPS, Contender, Found, Timing, interleave, note, rows_of

from dia_diffusion.data import open_images
from dia_diffusion.training.diffusion import DiffusionTask, training_batch
from sample import ATTENTIONS, pipeline_of

TRAIN = Path(__file__).parents[1] / "train" / "train.py"


def measure(batch_size: int, rounds: int, precision: str, device: torch.device) -> list[Found]:
    """Tables of the unit's cost in a training step and in a network call, of feeding, and of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(batch_size, precision, Path(folder))
        training = _training(setting, rounds, device)
        step = training.timings[0].median
        return [
            training,
            _calls(setting, rounds, device),
            _feeding(setting, rounds, device, step),
            *([_processes(setting)] if device.type == "cpu" else []),
        ]


def _training(setting: Setting, rounds: int, device: torch.device) -> Found:
    # As train.compile auto does for few steps; on a GPU, an uncompiled step times Python's kernel launches.
    way, how = ("", "not compiled") if device.type == "cpu" else (COMPILED, "compiled")
    contenders = [
        Contender(name, own_step(experiment_of(name + way, setting)), setting.batch_size) for name in ATTENTIONS
    ]
    timings = interleave(contenders, rounds, device, STEPS)
    title = f"The unit in a training step, U-ViT-S/2, batch {setting.batch_size}, {setting.precision}, {how}"
    return Found(title, rows_of(timings, timings[0]), timings)


def _calls(setting: Setting, rounds: int, device: torch.device) -> Found:
    """Calls of the network, which are 95 % or more of sampling."""
    sample, contenders = torch.randn(setting.batch_size, 3, 32, 32, device=device), []
    time = torch.tensor(500, device=device)  # already there, as a scheduler's are
    for name, attention in ATTENTIONS.items():
        network = pipeline_of(attention, setting.precision, device).unet
        noisy = sample.to(network.dtype)

        def call(network: torch.nn.Module = network, noisy: torch.Tensor = noisy) -> None:
            with torch.no_grad():
                network(noisy, time)

        contenders.append(Contender(name, call, setting.batch_size))
    timings = interleave(contenders, 2 * rounds, device, STEPS)
    title = f"The unit in a sampling step, U-ViT-S/2, batch {setting.batch_size}, {setting.precision}"
    return Found(title, rows_of(timings, timings[0]), timings)


def _feeding(setting: Setting, rounds: int, device: torch.device, seconds_of_step: float) -> Found:
    """Drawing a step's random numbers and fetching its images from memory, a memory map or a folder of PNGs."""
    array = made_up_images(setting.work, 32)
    folder = setting.work / "pngs"
    folder.mkdir(exist_ok=True)
    for index, pixels in enumerate(np.load(array)):
        Image.fromarray(pixels).save(folder / f"{index:05d}.png")
    contenders = []
    for name, source, limit in (("in memory", array, 1 << 40), ("memory map", array, 0), ("folder of PNGs", folder, 0)):
        images = open_images(str(source), size=32, channels=3, memory_limit=limit, cache=setting.work / "cache")
        experiment = experiment_of(OURS, setting)
        task = DiffusionTask(experiment)
        task.images = images
        numbers = iter(range(1 << 30))

        def feed(task: DiffusionTask = task, numbers: object = numbers) -> None:
            for _ in range(10):
                draws = task.draw(next(numbers), 0, setting.batch_size)  # type: ignore[call-overload]
                training_batch(task.images, task.experiment, draws, device, torch.float32)

        contenders.append(Contender(name, feed, 10 * setting.batch_size))
    rows = []
    for timing in interleave(contenders, max(rounds, 5), device):
        seconds = timing.median / 10
        rows.append({"what": timing.name, "ms a step": 1000 * seconds, "% of a step": 100 * seconds / seconds_of_step})
    return Found("Feeding: draws and images of a step", rows)


def _processes(setting: Setting, rounds: int = 2, steps: int = 3) -> Found:
    """One process with two threads against two with one each, at the same global batch size, by their logged rates."""
    timings = {
        1: Timing("1 process, 2 threads", setting.batch_size, None),
        2: Timing("2 processes, 1 thread each", setting.batch_size, None),
    }
    for number in range(rounds):
        for processes, timing in timings.items():
            note(f"processes: {timing.name}, round {number + 1} of {rounds}")
            experiment = experiment_of(OURS, setting)
            run = setting.work / f"processes-{processes}-{number}"
            timing.seconds += _run(experiment.data.source, run, processes, setting, steps)
    one, two = timings.values()
    return Found("Two processes", rows_of([one, two], one), [one, two])


def _run(source: str, run: Path, processes: int, setting: Setting, steps: int) -> list[float]:
    """Seconds of each step except the first, which is a warm-up."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    keys = {
        "config": "cifar10_uvit_s2", "data.source": source, "output": run, "train.batch_size": setting.batch_size,
        "train.mixed_precision": setting.precision, "train.compile": "false", "train.max_steps": steps + 1,
        "train.log_every": 1, "train.sample_every": 0,
    }  # fmt: skip
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    threads = str(2 // processes)
    subprocess.run(
        [*(launcher if processes > 1 else [sys.executable]), str(TRAIN), *words],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": threads},
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [setting.batch_size / line["images_per_second"] for line in lines if "images_per_second" in line][1:]
