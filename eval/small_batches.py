"""The tests of docs/results/small-batches.md, written before its runs: python eval/small_batches.py [RUNS]

Reads the results.json that `dia-diffusion curves STUDY` writes to RUNS/STUDY (default runs/studies) and prints a table
for each question: the primary outcome, then the secondary ones, with Holm's p values over all outcomes of the question.
"""

import json
import sys
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import mean, stdev

from dia_diffusion.sweeps.stats import (
    brown_forsythe,
    detectable_difference,
    estimate,
    holm,
    paired_test,
    pitman_morgan,
)

DIGITS, CLOCK, RATES, CHOSEN, PARTS, CIFAR10 = (
    f"small_batch_{name}"
    for name in ("digits", "digits_clock", "digits_rates", "digits_chosen", "digits_parts", "cifar10")
)
NONE, DIA, IDENTITY, TIME = "none", "dia-lstm", "dia-lstm-identity", "block-channels-time"


@dataclass(frozen=True)
class Comparison:
    """Compares the final distances of two units at a batch size, paired by seed."""

    unit: str
    other: str
    batch_size: int = 4
    study: str = DIGITS
    other_study: str = DIGITS
    spread: bool = False
    """Compares variances instead of means."""


# The learning rates from which question 4 chooses for each twin.
RATES_OF = [(IDENTITY, "identity-half", "identity-double"), (NONE, "none-half", "none-double")]

# question -> the primary outcome and then the secondary ones
QUESTIONS = {
    "1. Digits": [
        Comparison(IDENTITY, NONE),
        Comparison(DIA, NONE),
        Comparison(TIME, NONE),
        Comparison(IDENTITY, DIA),
        Comparison(IDENTITY, TIME),
        Comparison(IDENTITY, NONE, spread=True),
        Comparison(DIA, NONE, spread=True),
        *(Comparison(unit, NONE, size) for size in (8, 32) for unit in (IDENTITY, DIA)),
    ],
    "2. CIFAR-10": [
        Comparison(IDENTITY, NONE, 4, CIFAR10, CIFAR10),
        Comparison(IDENTITY, NONE, 32, CIFAR10, CIFAR10),
        *(Comparison(TIME, NONE, size, CIFAR10, CIFAR10) for size in (4, 32)),
    ],
    "3. Equal time": [Comparison(IDENTITY, NONE, 4, DIGITS, CLOCK)],
    "5. Parts": [
        Comparison(IDENTITY, "se-shared", 4, DIGITS, PARTS),
        Comparison("se-shared", "se-individual", 4, PARTS, PARTS),
        Comparison("se-shared", TIME, 4, PARTS, DIGITS),
        Comparison(TIME, "channels", 4, DIGITS, PARTS),
        Comparison("channels", NONE, 4, PARTS, DIGITS),
    ],
}


def distances(folder: Path, study: str, unit: str, batch_size: int) -> dict[int, float]:
    """seed -> final distance; empty where the study has no results yet."""
    path = folder / study / "results.json"
    if not path.is_file():
        return {}
    points = json.loads(path.read_text())["final_points"]
    return {p["seed"]: p["distance"] for p in points if (p["unit"], p["batch_size"]) == (unit, batch_size)}


def paired(folder: Path, comparison: Comparison) -> tuple[list[float], list[float]]:
    """Both units' final distances for their common seeds, in the same order."""
    first = distances(folder, comparison.study, comparison.unit, comparison.batch_size)
    second = distances(folder, comparison.other_study, comparison.other, comparison.batch_size)
    seeds = sorted(first.keys() & second.keys())
    return [first[seed] for seed in seeds], [second[seed] for seed in seeds]


def row(folder: Path, comparison: Comparison) -> tuple[list[str], float | None]:
    """A comparison's cells without its adjusted p value, and its p value."""
    a, b = paired(folder, comparison)
    cells = [f"{comparison.batch_size}", f"{comparison.unit} - {comparison.other}", f"{len(a)}"]
    if len(a) < 3:
        return [*cells, "-", "-", "-"], None
    if comparison.spread:
        p, beside = pitman_morgan(a, b), brown_forsythe(a, b)
        deviations = f"deviations {stdev(a):.3f}, {stdev(b):.3f}"
        return [*cells, deviations, f"Brown-Forsythe p {beside:.4f}", f"{p:.4f}"], p
    p, difference = paired_test(a, b), estimate([x - y for x, y in zip(a, b, strict=True)])
    interval = f"[{difference.low:+.3f}, {difference.high:+.3f}]"
    return [*cells, f"{difference.mean:+.3f}", interval, f"{p:.4f}"], p


def best_rate(folder: Path, units: tuple[str, ...]) -> str:
    """The unit with the smallest mean final distance over the seeds of the study of rates."""
    final = {unit: distances(folder, RATES, unit, 4).values() for unit in units}
    return min(units, key=lambda unit: mean(final[unit]) if final[unit] else inf)


def main(folder: Path) -> None:
    """Prints a Markdown table for each question."""
    identity, none = (best_rate(folder, units) for units in RATES_OF)
    questions = {**QUESTIONS, "4. Best rates": [Comparison(identity, none, 4, CHOSEN, CHOSEN)]}
    for question, comparisons in sorted(questions.items()):
        cells, p_values = zip(*(row(folder, comparison) for comparison in comparisons), strict=True)
        adjusted = [None, *holm(p_values[1:])]
        print(f"{question}\n\n| batch size | units | seeds | difference | 95 % interval | p | p (Holm) |")
        print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
        for one, p in zip(cells, adjusted, strict=True):
            print(f"| {' | '.join([*one, '-' if p is None else f'{p:.4f}'])} |")
        a, b = paired(folder, comparisons[0])
        if len(a) >= 3:
            smallest = detectable_difference(len(a)) * stdev(x - y for x, y in zip(a, b, strict=True))
            print(f"\nPrimary outcome: 80 % power for a difference of {smallest:.2f} at the measured deviation.")
        print()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/studies"))
