"""The order of the contenders, the ratios, exponents, counts and precision reported, and the agreement of distances."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fid import check_agreement, make_folders, of_folders, side_by_side
from run import _parser, _precision
from timing import (
    STEPS,
    Contender,
    Timing,
    block_size,
    exponent,
    flops_of,
    interleave,
    matmul_peak,
    memory_now,
    memory_peak,
    rows_of,
)

from dia_diffusion import precision
from dia_diffusion.errors import InputError

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
    """A machine that slows down by half between rounds changes no ratio."""
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


@pytest.mark.parametrize(("flags", "expected"), [("fpu avx2", "none"), ("fpu avx2 amx_bf16", "bf16")])
def test_precision_is_what_the_cpu_has(
    flags: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.delenv(precision.ONEDNN_LIMIT, raising=False)
    chosen = _precision(_parser().parse_args([]).precision, CPU)
    assert chosen.name == expected and "this CPU has" in str(chosen)
    assert str(_precision("none", CPU)) == "float32 (by --precision)"


def test_fp16_is_refused_without_a_gpu() -> None:
    with pytest.raises(InputError, match="`--precision` must be auto, bf16 or none without a CUDA GPU, got fp16"):
        _precision("fp16", CPU)


def test_the_peak_is_measured_in_the_precision_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of 64x64 matrices takes 2 x 64^3 operations."""
    seen: set[torch.dtype] = set()

    def seconds(run, device, times=1) -> float:  # type: ignore[no-untyped-def]
        seen.add(run().dtype)
        return 0.5

    monkeypatch.setattr("timing.SIDE", {"cpu": 64})
    monkeypatch.setattr("timing.seconds_of", seconds)
    assert matmul_peak("none", CPU) == 2 * 64**3 / 0.5 and seen == {torch.float32}


backends: Any = torch.backends


@pytest.fixture
def coarse() -> Iterator[None]:
    """Convolutions in bfloat16 if the CPU has it: the counterpart of TF32 on a GPU."""
    backends.mkldnn.conv.fp32_precision = "bf16"
    yield
    backends.mkldnn.conv.fp32_precision = "none"


def test_a_coarse_contender_is_compared_in_exact_float32_and_timed_coarse(coarse: None) -> None:
    draw = torch.Generator().manual_seed(0)
    images, weight = (torch.randn(*shape, generator=draw) for shape in ((4, 16, 32, 32), (16, 16, 3, 3)))
    exact = float(F.conv2d(images.double(), weight.double()).square().mean() - 141.9)
    settings: list[str] = []

    def theirs() -> float:
        settings.append(backends.mkldnn.conv.fp32_precision)
        return float(F.conv2d(images, weight).double().square().mean() - 141.9)

    runs = {"ours": lambda: exact, "theirs": theirs}
    check_agreement(runs)
    found = side_by_side("a convolution", runs, 1, 2, CPU)
    assert settings == ["ieee", "bf16", "bf16"] and len(found.timings[1].seconds) == 2


def test_contenders_that_disagree_are_named() -> None:
    with pytest.raises(AssertionError, match=r"they disagree: .*'theirs': 1.01"):
        check_agreement({"ours": lambda: 1.0, "theirs": lambda: 1.01})


def test_contenders_measure_the_same_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIA_DIFFUSION_CACHE", str(tmp_path / "cache"))  # a contender changes it
    runs = of_folders(*make_folders(tmp_path, 4), "cifar10", None, tmp_path)
    assert runs["dia-diffusion"]() == pytest.approx(runs["torch-fidelity"](), rel=1e-4)
