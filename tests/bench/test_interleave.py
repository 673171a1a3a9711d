"""The bench's own arithmetic: who runs when, and what ratios, exponents and counts come out."""

import pytest
import torch
from interleave import STEPS, Contender, Timing, block_size, exponent, interleave
from limits import flops_of, memory_now, memory_peak
from results import rows_of

CPU = torch.device("cpu")


def test_contenders_take_turns() -> None:
    ran: list[str] = []
    contenders = [Contender(name, lambda name=name: ran.append(name)) for name in "AB"]
    timings = interleave(contenders, 2, CPU)
    assert "".join(ran) == "AB" + "ABAB"
    assert [len(timing.seconds) for timing in timings] == [2, 2]


def test_short_runs_are_timed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ran = [0.0], []

    def take(seconds: float, name: str) -> None:
        clock[0] += seconds
        ran.append(name)

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    contenders = [Contender("short", lambda: take(0.01, "short")), Contender("long", lambda: take(1.2, "long"))]
    short, long = interleave(contenders, 2, CPU, most=STEPS)
    assert (short.block, long.block) == (20, 1)
    assert ran.count("short") == 1 + 1 + 20 + 2 * 20, "warm-ups, and two rounds of a block"
    assert short.seconds == pytest.approx([0.01] * 2) and long.seconds == pytest.approx([1.2] * 2)
    assert block_size(5.0, torch.device("cuda"), STEPS) == 20, "of which the host sees the queueing alone"


def test_ratios_are_of_the_same_round() -> None:
    """A machine that gets slower by half between rounds changes no ratio."""
    slow, fast = Timing("slow", 8, 6e9, seconds=[2.0, 3.0, 2.0]), Timing("fast", 8, 6e9, seconds=[1.0, 1.5, 1.0])
    assert slow.ratio_to(fast) == (2.0, 2.0, 2.0)
    row = rows_of([slow], fast, peak=1e10)[0]
    assert row["images/s"] == 4.0 and row["% of peak"] == pytest.approx(30)


def test_exponent_of_a_power() -> None:
    assert exponent([2, 4, 8], [1, 5 * 4**1.5, 5 * 8**1.5]) == pytest.approx(1.5)


def test_operations_of_a_product_and_of_attention() -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert flops_of(lambda: a @ b) == 2 * 3 * 5 * 7
    q = torch.randn(1, 2, 11, 4)
    counted = flops_of(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert counted == 2 * (2 * 2 * 11 * 11 * 4)  # two products for each of two heads


def test_memory_peak_remembers_what_was_freed() -> None:
    before = memory_now(CPU)
    torch.ones(64 << 20, dtype=torch.uint8).sum()
    assert memory_peak(CPU) - before > 60 << 20
