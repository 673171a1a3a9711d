"""`python bench/agreement.py`: how much results differ when the same work is split differently; a table and JSON.

Every training step, sample and distance is a function of the recipe and the seeds alone, but each split adds numbers in
a different order. Runs on CPUs, with gloo between processes.
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timing import Found, console, show
from torch import Tensor

from dia_diffusion.cli.main import main as command
from dia_diffusion.environment import environment
from dia_diffusion.errors import Stopped
from dia_diffusion.evaluation.record import read_records
from dia_diffusion.io import step_name, write_json
from dia_diffusion.sampling.load import load_pipeline
from dia_diffusion.training.callbacks import Callback
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.run_folder import read_metrics
from dia_diffusion.training.trainer import StepResult, Trainer

RECIPE, STEPS = "digits_uvit_cpu_dia", 20
OPTIONS = {
    "train.max_steps": STEPS, "train.batch_size": 32, "train.log_every": 1, "train.checkpoint_every": STEPS,
    "train.sample_every": 0, "train.compile": False, "optimizer.warmup_steps": 10,
}  # fmt: skip
DTYPES = ("float64", "float32", "bf16")
TRAININGS: dict[str, tuple[int, dict[str, Any]]] = {
    "the same again": (1, {}),
    "2 processes": (2, {}),
    "4 processes": (4, {}),
    "accumulation 2": (1, {"train.accumulation": 2}),
    "accumulation 4": (1, {"train.accumulation": 4}),
    "accumulation 8": (1, {"train.accumulation": 8}),
    "2 processes x accumulation 4": (2, {"train.accumulation": 4}),
    "gradient checkpointing": (1, {"train.gradient_checkpointing": True}),
}
IMAGES, SAMPLER_STEPS = 64, 10


def on_processes(count: int, work: Callable[..., None], *arguments: Any) -> None:
    """Runs `work` in `count` connected processes of one thread each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=_process, args=(rank, count, port, work, arguments)) for rank in range(count)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    if any(process.exitcode for process in running):
        sys.exit(f"bench: {work.__name__} failed on {count} processes")


def _process(rank: int, count: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if count > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    torch.set_num_threads(1)
    work(*arguments)


class StopAt(Callback):
    """Sends SIGTERM after a step."""

    def __init__(self, step: int):
        self.step = step

    def due(self, step: int) -> bool:
        return step == self.step

    def __call__(self, trainer: Trainer, result: StepResult) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def train(folder: str, dtype: str, options: dict[str, Any], stop_at: int = 0) -> None:
    """Trains the recipe as one of its processes; a positive `stop_at` is the step after which SIGTERM stops it."""
    torch.set_default_dtype(torch.float64 if dtype == "float64" else torch.float32)
    precision = {"train.mixed_precision": "bf16" if dtype == "bf16" else "none"}
    experiment = read_experiment(RECIPE, keys={**OPTIONS, **precision, **options, "output": folder})
    with suppress(Stopped):
        Trainer(experiment, callbacks=[StopAt(stop_at)]).run()


def measure_fid(run: str, record: str, batch_size: int) -> None:
    """Samples images from the run and records their distance to the digits."""
    options = ["--reference", "digits", "--num", str(4 * IMAGES), "--steps", str(SAMPLER_STEPS), "--record", record]
    with open(os.devnull, "w") as nowhere:
        sys.stdout = nowhere
        sys.exit(command(["fid", run, *options, "--batch-size", str(batch_size)]))


def trained(folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and the final weights of a run."""
    weights = load_file(folder / "checkpoints" / step_name(STEPS) / "model.safetensors")
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")], weights


def deviations(folder: Path, base: Path) -> tuple[float, float]:
    """The largest relative difference of two runs' losses, and of their weights, relative to the largest weight."""
    (losses, weights), (own_losses, own_weights) = trained(folder), trained(base)
    of_losses = max(abs(a - b) / abs(b) for a, b in zip(losses, own_losses, strict=True))
    largest = max(float(tensor.abs().max()) for tensor in own_weights.values())
    of_weights = max(float((weights[name] - tensor).abs().max()) for name, tensor in own_weights.items())
    return of_losses, of_weights / largest


def trainings(work: Path) -> Found:
    """Compares trainings split over processes, accumulation and restarts with one uninterrupted process."""
    rows: dict[str, dict[str, Any]] = {}
    for dtype in DTYPES:
        base = work / f"{dtype}-base"
        on_processes(1, train, str(base), dtype, {})
        for name, (count, options) in TRAININGS.items():
            folder = work / f"{dtype}-{name}"
            on_processes(count, train, str(folder), dtype, options)
            _note(rows, name, dtype, deviations(folder, base))
        for name, count, stops in (("stopped at each step", 1, range(1, STEPS)), ("then on 2 processes", 2, [7, 13])):
            found = []
            for stop in stops:
                folder = work / "stopped"
                on_processes(1, train, str(folder), dtype, {}, stop)
                on_processes(count, train, str(folder), dtype, {})
                found.append(deviations(folder, base))
                shutil.rmtree(folder)
            _note(rows, name, dtype, (max(a for a, _ in found), max(b for _, b in found)))
    title = (
        f"{RECIPE}, {STEPS} steps of 32 images: largest difference of losses (relative) and of weights (over largest)"
    )
    return Found(title, list(rows.values()))


def _note(rows: dict[str, dict[str, Any]], name: str, dtype: str, found: tuple[float, float]) -> None:
    console.print(f"  {dtype}, {name}: {found[0]:.1e}, {found[1]:.1e}", style="dim")
    rows.setdefault(name, {"what": name}).update({f"{dtype}, loss": found[0], f"{dtype}, weights": found[1]})


def samples(work: Path) -> Found:
    """Compares the images of seeds 0..63 sampled in smaller batches with those of a single batch."""
    rows: dict[int, dict[str, Any]] = {}
    place = work / "float32-base" / "pipelines" / step_name(STEPS)
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32), ("bf16", torch.bfloat16)):
        pipeline = load_pipeline(place, dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)

        def drawn(size: int, pipeline: Any = pipeline) -> Tensor:
            parts = []
            for start in range(0, IMAGES, size):
                generators = [torch.Generator().manual_seed(seed) for seed in range(start, start + size)]
                options = {"num_inference_steps": SAMPLER_STEPS, "output_type": "pt"}
                parts.append(pipeline(batch_size=size, generator=generators, **options).images.double())
            return torch.cat(parts)

        whole = drawn(IMAGES)
        for size in (1, 2, 4, 8, 16, 32):
            row = rows.setdefault(size, {"what": f"batches of {size}"})
            row[name] = float((drawn(size) - whole).abs().max())
    title = (
        f"{IMAGES} samples of {SAMPLER_STEPS} steps, against a batch of {IMAGES}: largest difference of a pixel in 0..1"
    )
    return Found(title, list(rows.values()))


def distances(work: Path) -> Found:
    """Compares the distance for several numbers of processes and batch sizes with that of one process."""
    run = work / "float32-base"
    found = {}
    for name, count, size in (
        ("1 process, batches of 64", 1, 64), ("1 process, batches of 8", 1, 8),
        ("2 processes, batches of 64", 2, 64), ("4 processes, batches of 16", 4, 16),
    ):  # fmt: skip
        record = work / f"{name}.jsonl"
        on_processes(count, measure_fid, str(run), str(record), size)
        found[name] = read_records(record)[0].distance
    base = next(iter(found.values()))
    rows = [{"what": name, "FD": value, "relative": abs(value - base) / base} for name, value in found.items()]
    return Found(f"Frechet distance of {4 * IMAGES} samples to the digits, in float32 networks", rows)


def main() -> None:
    parser = argparse.ArgumentParser("bench/agreement.py", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/agreement.json"), help="the JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        tables = [trainings(Path(work)), samples(Path(work)), distances(Path(work))]
    for found in tables:
        show(found)
    tabled = [{"title": found.title, "rows": found.figures} for found in tables]
    write_json(options.out, {"environment": environment(1), "tables": tabled})
    console.print(options.out)


if __name__ == "__main__":
    main()
