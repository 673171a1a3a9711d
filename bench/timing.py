"""Interleaved timing, the limits of the machine, and tables of the results.

Contenders take turns, A B A B ..., so that a drift in the machine's speed affects all equally. Short runs are timed in
blocks: a GPU's work is queued, and waiting for it after each run would hide that.
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dia_diffusion.io import write_json

STEPS = 20
"""Most training steps or network calls in a block."""
CPU_BLOCK_SECONDS = 1.0


@dataclass
class Contender:
    """Something that can be timed."""

    name: str
    run: Callable[[], object]
    images: int = 1
    """Images that one run handles."""
    flops: float | None = None
    """Floating-point operations of one run; a multiply-add counts as two."""


@dataclass
class Timing:
    """A contender's seconds per run, one number per interleaved round; the warm-up run is separate."""

    name: str
    images: int
    flops: float | None
    first: float = 0.0
    """Seconds of the warm-up, including any compilation."""
    seconds: list[float] = field(default_factory=list)
    block: int = 1
    """Runs that are timed together in each round."""

    @property
    def median(self) -> float:
        """Median seconds per run."""
        return median(self.seconds)

    @property
    def images_per_second(self) -> float:
        """The rate at the median time."""
        return self.images / self.median

    def ratio_to(self, other: "Timing") -> tuple[float, float, float]:
        """This one's seconds over the other's, round by round: median, lowest, highest."""
        ratios = sorted(mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True))
        return median(ratios), ratios[0], ratios[-1]


def interleave(
    contenders: Sequence[Contender],
    rounds: int,
    device: torch.device,
    most: int = 1,
    warm_up: bool = True,
) -> list[Timing]:
    """Warms each contender up, then times a block of runs of each in turn, `rounds` times.

    most: runs in a block on a GPU; fewer on a CPU if they take long.
    warm_up: False if the contenders are warm and each run is long; each block is then one run.
    """
    timings = [Timing(contender.name, contender.images, contender.flops) for contender in contenders]
    for contender, timing in zip(contenders, timings, strict=True) if warm_up else ():
        note(f"warming up: {contender.name}")
        timing.first = seconds_of(contender.run, device)
        if most > 1:
            timing.block = block_size(seconds_of(contender.run, device), device, most)
        if timing.block > 1:  # CUDA graphs are recorded in the first few runs
            seconds_of(contender.run, device, timing.block)
    for number in range(rounds):
        note(f"round {number + 1} of {rounds}")
        for contender, timing in zip(contenders, timings, strict=True):
            timing.seconds.append(seconds_of(contender.run, device, timing.block))
    return timings


def block_size(seconds: float, device: torch.device, most: int) -> int:
    """How many runs of this many seconds to time together: `most` on a GPU, about a second's worth on a CPU."""
    return most if device.type == "cuda" else min(most, max(1, round(CPU_BLOCK_SECONDS / seconds)))


def seconds_of(run: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Mean seconds per run of several, without waiting between them, including their work on the device."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(times):
        run()
    _wait(device)
    return (time.perf_counter() - started) / times


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent a in value ~ size^a, between the last two sizes."""
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": torch.float32}
SIDE = {"cpu": 4096, "cuda": 8192}
"""Side of the square matrices; larger ones gave no higher rate."""


def matmul_peak(precision: str, device: torch.device, tries: int = 5) -> float:
    """Operations per second of large matrix products in this precision: the fastest of a few blocks.

    float32 products follow torch's current settings, as in training: float32, or TF32 if it was switched on.
    """
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=DTYPES[precision]) for _ in range(2))
    block = block_size(seconds_of(lambda: a @ b, device), device, STEPS)
    return 2 * side**3 / min(seconds_of(lambda: a @ b, device, block) for _ in range(tries))


def flops_of(run: Callable[[], object]) -> float:
    """Operations in the matrix products and convolutions of one run."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # fused attention on a CPU is not counted
        run()
    return float(counter.get_total_flops())


def memory_now(device: torch.device) -> int:
    """Bytes in use: of the GPU's memory on a GPU, else by the process. Resets the GPU's peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return _process_memory("VmRSS")


def memory_peak(device: torch.device) -> int:
    """The peak bytes in use so far."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _process_memory("VmHWM")


def _process_memory(name: str) -> int:
    """From /proc, for this process alone: getrusage's peak is that of the parent process if that was higher."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


matplotlib.use("agg")


console = Console(highlight=False, width=140)


@dataclass
class Found:
    """A table of results.

    figures: rows of plain numbers or text, all with the same keys.
    timings: the raw seconds behind the figures.
    """

    title: str
    figures: list[dict[str, Any]]
    timings: list[Timing] = field(default_factory=list)
    note: str = ""


def rows_of(timings: list[Timing], base: Timing, peak: float | None = None) -> list[dict[str, Any]]:
    """One row per timing: times and their ratios to the base's, round by round."""
    rows = []
    for timing in timings:
        ratio, low, high = timing.ratio_to(base)
        row: dict[str, Any] = {
            "what": timing.name,
            "seconds": timing.median,
            "images/s": timing.images_per_second,
            f"time / {base.name}'s": f"{ratio:.3f} [{low:.3f}, {high:.3f}]",
        }
        if peak is not None and timing.flops is not None:
            row["TFLOP"] = timing.flops / 1e12
            row["% of peak"] = 100 * timing.flops / timing.median / peak
        rows.append(row)
    return rows


def note(text: str) -> None:
    """Prints a line of progress."""
    console.print(f"  {text}", style="dim")


def show(found: Found) -> None:
    """Prints the table."""
    table = Table(title=found.title, title_justify="left", caption=found.note or None, caption_justify="left")
    for column in found.figures[0]:
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in found.figures:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


def save(tables: list[Found], about: dict[str, Any], path: Path) -> None:
    """Writes PATH.json, with all raw timings, and PATH.png."""
    write_json(path.with_suffix(".json"), {**about, "tables": [asdict(found) for found in tables]})
    timed = [found for found in tables if found.timings]
    if not timed:
        return
    figure, axes = plt.subplots(
        len(timed), 1, figsize=(9, sum(0.9 + 0.4 * len(found.timings) for found in timed)), squeeze=False,
        gridspec_kw={"height_ratios": [1 + len(found.timings) for found in timed]}, layout="constrained",
    )  # fmt: skip
    for found, axis in zip(timed, axes[:, 0], strict=True):
        names = [timing.name for timing in found.timings]
        medians = [timing.median for timing in found.timings]
        axis.barh(names, medians, color="#4878a8", height=0.6)
        for place, timing in enumerate(found.timings):
            axis.plot(timing.seconds, [place] * len(timing.seconds), "k|", markersize=9)
        axis.invert_yaxis()
        axis.set_title(found.title, fontsize=9, loc="left")
        axis.set_xlabel("seconds a run: median, and each round", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)
