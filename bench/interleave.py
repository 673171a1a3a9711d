"""Timing side by side: A B A B ..., so that a machine whose speed drifts drifts for all alike."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch


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
    """A contender's seconds, one an interleaved round; the first run, a warm-up, apart."""

    name: str
    images: int
    flops: float | None
    first: float = 0.0
    """Seconds of the warm-up: compilation, if there is one, is in it."""
    seconds: list[float] = field(default_factory=list)

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
    contenders: Sequence[Contender], rounds: int, device: torch.device, told: Callable[[str], None] = lambda text: None
) -> list[Timing]:
    """Runs each contender once to warm up, then all of them in turn, `rounds` times."""
    timings = [Timing(contender.name, contender.images, contender.flops) for contender in contenders]
    for contender, timing in zip(contenders, timings, strict=True):
        told(f"warming up: {contender.name}")
        timing.first = seconds_of(contender.run, device)
    for number in range(rounds):
        told(f"round {number + 1} of {rounds}")
        for contender, timing in zip(contenders, timings, strict=True):
            timing.seconds.append(seconds_of(contender.run, device))
    return timings


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, its work on the device included."""
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - started


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent a in value ~ size^a, between the last two sizes."""
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
