"""Timing side by side: A B A B ..., so that a machine whose speed drifts drifts for all alike.

Short runs are timed in blocks: a GPU's work is queued ahead of it, and waiting for it after each run would hide that.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

STEPS = 20
"""Training steps or network calls in a block, at the most."""
CPU_BLOCK_SECONDS = 1.0


@dataclass
class Contender:
    """Something that can be timed."""

    name: str
    run: Callable[[], object]
    images: int = 1
    """Images that one run handles."""
    flops: float | None = None
    """Floating-point operations of one run, a multiplication and an addition counted as two."""


@dataclass
class Timing:
    """A contender's seconds a run, one number an interleaved round; the first run, a warm-up, apart."""

    name: str
    images: int
    flops: float | None
    first: float = 0.0
    """Seconds of the warm-up: compilation, if there is one, is in it."""
    seconds: list[float] = field(default_factory=list)
    block: int = 1
    """Runs that are timed together in a round."""

    @property
    def median(self) -> float:
        """Seconds."""
        return median(self.seconds)

    @property
    def images_per_second(self) -> float:
        """By the median."""
        return self.images / self.median

    def ratio_to(self, other: "Timing") -> tuple[float, float, float]:
        """This one's seconds over the other's, round by round: median, lowest, highest."""
        ratios = sorted(mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True))
        return median(ratios), ratios[0], ratios[-1]

    def utilisation(self, peak: float) -> float | None:
        """Its rate of floating-point operations over `peak` (a second)."""
        return None if self.flops is None else self.flops / self.median / peak


def interleave(
    contenders: Sequence[Contender],
    rounds: int,
    device: torch.device,
    told: Callable[[str], None] = lambda text: None,
    most: int = 1,
) -> list[Timing]:
    """Warms each contender up, then times a block of runs of each in turn, `rounds` times.

    most: runs in a block on a GPU; fewer on a CPU where they take long.
    """
    timings = [Timing(contender.name, contender.images, contender.flops) for contender in contenders]
    for contender, timing in zip(contenders, timings, strict=True):
        told(f"warming up: {contender.name}")
        timing.first = seconds_of(contender.run, device)
        if most > 1:
            timing.block = block_size(seconds_of(contender.run, device), device, most)
        if timing.block > 1:  # CUDA graphs are recorded in the first few runs
            seconds_of(contender.run, device, timing.block)
    for number in range(rounds):
        told(f"round {number + 1} of {rounds}")
        for contender, timing in zip(contenders, timings, strict=True):
            timing.seconds.append(seconds_of(contender.run, device, timing.block))
    return timings


def block_size(seconds: float, device: torch.device, most: int) -> int:
    """How many runs of so many seconds to time together: `most` on a GPU, those of a second on a CPU."""
    return most if device.type == "cuda" else min(most, max(1, round(CPU_BLOCK_SECONDS / seconds)))


def seconds_of(run: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Seconds a run, mean of several without waiting between them, their work on the device included."""
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
