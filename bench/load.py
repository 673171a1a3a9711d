"""`python bench/load.py`: what grows over time and with the number of images; a table, JSON and a figure.

train   two connected processes train for minutes with frequent checkpoints and grids, while another command evaluates
        each new pipeline: memory, open files, threads, disk and speed over time
fid     computes the distance of up to 50,000 images: seconds and memory against their number
index   opens folders and zips of up to 1,000,000 tiny images: seconds and memory against their number
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image
from timing import Found, console, show

from dia_diffusion.environment import environment
from dia_diffusion.evaluation.record import read_records
from dia_diffusion.io import write_json
from dia_diffusion.training.run_folder import read_metrics

matplotlib.use("agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
MOST_LINKS = 50_000
"""Hard links to one file; file systems allow 65,000."""
OPENING = """
import sys, time
from pathlib import Path
from dia_diffusion.data import open_images
def memory(name):
    status = Path("/proc/self/status").read_text()
    return int(status.split(name + ":")[1].split()[0]) / 1024
before, start = memory("VmRSS"), time.perf_counter()
images = open_images(sys.argv[1], size=4)
print(time.perf_counter() - start, memory("VmHWM") - before)
"""
"""Prints the seconds that opening the images took, and the peak memory in MiB."""


@dataclass
class Seen:
    """A process over time; memory in MiB."""

    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    """Without mapped files: the system decides how much of those stays in memory."""
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def look(self, pid: int, seconds: float) -> None:
        """Adds a reading of the process; does nothing if it has ended."""
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines())
            files = len(os.listdir(f"/proc/{pid}/fd"))
            memory, own = (int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon"))
        except (OSError, KeyError):
            return
        self.seconds.append(seconds)
        self.memory.append(memory)
        self.own.append(own)
        self.threads.append(int(fields["Threads"]))
        self.files.append(files)


def ends_of(values: list[float]) -> tuple[float, float]:
    """The medians of the second and the last fifth; in the first fifth a process is still starting up."""
    fifth = max(1, len(values) // 5)
    return float(np.median(values[fifth : 2 * fifth])), float(np.median(values[-fifth:]))


def size_of(folder: Path) -> int:
    """Total bytes of the files in a folder; files that disappear meanwhile are skipped."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return total


def train(work: Path, minutes: float) -> tuple[Found, dict[str, Any]]:
    """Trains on two processes for `minutes`, evaluating along the way."""
    run, log = work / "run", (work / "log").open("w")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29531"]
    command += [str(ROOT / "train" / "train.py"), "--config", "digits_uvit_cpu_dia", "--output", str(run)]
    options = {"max_steps": 10**6, "checkpoint_every": 50, "sample_every": 50, "log_every": 10, "compile": "false"}
    command += [word for key, value in options.items() for word in (f"--train.{key}", str(value))]
    command += ["--samples.count", "16", "--samples.steps", "5"]
    own = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, env=own, stdout=log, stderr=log)
    start = time.monotonic()
    seen: dict[int, Seen] = {}
    disk: dict[str, list[float]] = {"seconds": [], "checkpoints": [], "a pipeline": []}
    evaluation: subprocess.Popen[bytes] | None = None
    while time.monotonic() - start < 60 * minutes and running.poll() is None:
        now = time.monotonic() - start
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        for pid in map(int, children):
            seen.setdefault(pid, Seen()).look(pid, now)
        if pipelines := list((run / "pipelines").glob("step-*")):
            disk["seconds"].append(now)
            disk["checkpoints"].append(size_of(run / "checkpoints") / 2**20)
            disk["a pipeline"].append(size_of(pipelines[-1]) / 2**20)
            if evaluation is None or evaluation.poll() is not None:
                measured = ["fid", str(run), "--reference", "digits", "--num", "100", "--steps", "5"]
                evaluation = subprocess.Popen(
                    [sys.executable, "-m", "dia_diffusion", *measured], env=own, stdout=log, stderr=log
                )
        time.sleep(1)
    if running.poll() is not None:
        sys.exit(f"bench: the training ended by itself:\n{(work / 'log').read_text()[-2000:]}")
    running.send_signal(signal.SIGTERM)
    code = running.wait(60)
    if evaluation is not None:
        evaluation.wait(120)
    metrics, evaluations = read_metrics(run / "metrics.jsonl"), len(read_records(run / "evaluations.jsonl"))
    ranks = [one for one in seen.values() if one.seconds and one.seconds[-1] > 30 * minutes]
    rates = [line["images_per_second"] for line in metrics if "images_per_second" in line]
    rows = []
    for rank, one in enumerate(ranks):
        for name, values in (("memory, MiB", one.memory), ("open files", one.files), ("threads", one.threads)):
            rows.append(_row(f"process {rank}: {name}", [float(value) for value in values]))
    rows += [_row("checkpoints on disk, MiB", disk["checkpoints"]), _row("a pipeline on disk, MiB", disk["a pipeline"])]
    rows.append(_row("images/s, beside the evaluations", rates))
    steps, count = metrics[-1]["step"], len(list((run / "pipelines").glob("step-*")))
    note = f"{steps:,} steps, {count} checkpoints, grids and pipelines, {evaluations} evaluations; ended with {code}"
    raw = {"processes": [vars(one) for one in ranks], "disk": disk, "images_per_second": rates}
    return Found(f"{minutes:g} minutes of training on 2 processes", rows, note=note), raw


def _row(name: str, values: list[float]) -> dict[str, Any]:
    early, late = ends_of(values)
    return {"what": name, "second fifth": early, "last fifth": late, "change, %": 100 * (late / early - 1)}


def watched(command: list[str], environment: dict[str, str]) -> tuple[float, Seen, int]:
    """Runs a command to its end: seconds, readings over time, and its peak own memory in MiB."""
    start, seen = time.monotonic(), Seen()
    running = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    while running.poll() is None:
        seen.look(running.pid, time.monotonic() - start)
        time.sleep(0.2)
    if running.returncode:
        sys.exit(f"bench: {' '.join(command)} ended with {running.returncode}")
    return time.monotonic() - start, seen, round(max(seen.own))


def png(pixels: np.ndarray) -> bytes:
    """An image as the bytes of a PNG file."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def fid(work: Path, counts: list[int]) -> tuple[Found, dict[str, Any]]:
    """Computes the distance of zips of random images to one of 2,000 images."""
    generator = np.random.default_rng(0)
    rows, raw = [], {}
    for count in [2000, *counts]:
        with zipfile.ZipFile(work / f"{count}.zip", "w") as archive:
            for index in range(count):
                archive.writestr(f"{index:06d}.png", png(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)))
    for count in counts:
        measured = ["fid", str(work / f"{count}.zip"), "--reference", str(work / "2000.zip"), "--features", "cifar10"]
        command = [sys.executable, "-m", "dia_diffusion", *measured, "--record", str(work / f"{count}.jsonl")]
        cache = {"DIA_DIFFUSION_CACHE": str(work / f"cache-{count}")}
        seconds, seen, highest = watched(command, cache)
        assert read_records(work / f"{count}.jsonl")[0].protocol.num_samples == count
        rows.append(_per_image(f"{count:,} images", count, seconds, highest, rows))
        raw[count] = vars(seen)
        console.print(f"  fid, {count:,}: {seconds:.1f} s, {highest} MiB", style="dim")
    title = "A distance of 32x32 PNGs in a zip, features cifar10, the whole command, memory of its own"
    return Found(title, rows), {"fid": raw}


def _per_image(name: str, count: int, seconds: float, highest: float, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A row; the cost per additional image is relative to the previous row."""
    row: dict[str, Any] = {"what": name, "count": count, "seconds": seconds, "MiB": highest}
    more: tuple[Any, Any] = ("", "")
    if rows:
        last = rows[-1]
        images = count - last["count"]
        more = 1e6 * (seconds - last["seconds"]) / images, 2**20 * (highest - last["MiB"]) / images
    return {**row, "µs an image more": more[0], "bytes an image more": more[1]}


def index(work: Path, counts: list[int]) -> list[Found]:
    """Opens folders and zips of 4x4 images, which decodes them into the cache."""
    tables = []
    picture = png(np.zeros((4, 4, 3), dtype=np.uint8))
    for kind, make in (("folder", _folder), ("zip", _zip)):
        rows: list[dict[str, Any]] = []
        for count in counts:
            place = work / f"{kind}-{count}"
            make(place, count, picture)
            cache = {"DIA_DIFFUSION_CACHE": str(work / f"cache-{kind}-{count}")}
            done = subprocess.run(
                [sys.executable, "-c", OPENING, str(place)], env={**os.environ, **cache}, capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(f"bench: {place} can't be opened: {done.stderr[-2000:]}")
            seconds, highest = map(float, done.stdout.split())
            rows.append(_per_image(f"{count:,} images", count, seconds, round(highest, 1), rows))
            console.print(f"  {kind}, {count:,}: {seconds:.1f} s, {highest:.1f} MiB", style="dim")
        tables.append(Found(f"Opening a {kind} of 4x4 PNGs for the first time, imports left out", rows))
    return tables


def _folder(place: Path, count: int, picture: bytes) -> None:
    """Makes folders of hard links, which take little disk and time."""
    for index in range(count):
        folder = place / f"{index // 1000:04d}"
        if index % MOST_LINKS == 0:
            folder.mkdir(parents=True, exist_ok=True)
            original = folder / f"{index:07d}.png"
            original.write_bytes(picture)
            continue
        if index % 1000 == 0:
            folder.mkdir()
        os.link(original, folder / f"{index:07d}.png")


def _zip(place: Path, count: int, picture: bytes) -> None:
    with zipfile.ZipFile(place, "w") as archive:
        for index in range(count):
            archive.writestr(zipfile.ZipInfo(f"{index:07d}.png"), picture)


def draw(raw: dict[str, Any], path: Path) -> None:
    """Plots the training's memory, open files, threads and disk over time, and the memory of the distances."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
    for rank, one in enumerate(raw["train"]["processes"]):
        axes[0, 0].plot(one["seconds"], one["memory"], label=f"process {rank}")
        axes[0, 1].plot(one["seconds"], one["files"], label=f"process {rank}: open files")
        axes[0, 1].plot(one["seconds"], one["threads"], "--", label=f"process {rank}: threads")
    axes[1, 0].plot(raw["train"]["disk"]["seconds"], raw["train"]["disk"]["checkpoints"], label="checkpoints")
    for count, seen in raw["fid"].items():
        axes[1, 1].plot(seen["seconds"], seen["memory"], label=f"{count:,} images")
    titles = (
        "training: memory, MiB",
        "training: open files, threads",
        "training: disk, MiB",
        "fid: memory with mapped files, MiB",
    )
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("seconds", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        "bench/load.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="of training")
    parser.add_argument("--images", type=int, default=50_000, help="to evaluate, at the most")
    parser.add_argument("--index", type=int, default=1_000_000, help="images to open, at the most")
    parser.add_argument("--out", type=Path, default=Path("docs/results/load"), help="the JSON's and figure's name")
    options = parser.parse_args()
    steps: Callable[[int], list[int]] = lambda most: [most // 10, most // 2, most]  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        trained, raw = train(work, options.minutes)
        measured, of_fid = fid(work, steps(options.images))
        tables = [trained, measured, *index(work, [options.index // 100, options.index // 10, options.index])]
    for found in tables:
        show(found)
    tabled = [{"title": found.title, "rows": found.figures, "note": found.note} for found in tables]
    raw = {"train": raw, **of_fid}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out.with_suffix(".json"), {"environment": environment(2), "tables": tabled, "seen": raw})
    draw(raw, options.out.with_suffix(".png"))
    console.print(f"{options.out}.json, {options.out}.png")


if __name__ == "__main__":
    main()
