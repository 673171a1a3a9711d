"""Which precision the bench measures in, and what a figure says of it."""

from pathlib import Path

import pytest
import torch
from limits import matmul_peak
from run import _parser, _precision

from dia_diffusion import precision
from dia_diffusion.errors import InputError

CPU = torch.device("cpu")


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
    """Of matrices of 64 rows, a product takes 2 x 64^3 operations."""
    seen: set[torch.dtype] = set()

    def seconds(run, device, times=1) -> float:  # type: ignore[no-untyped-def]
        seen.add(run().dtype)
        return 0.5

    monkeypatch.setattr("limits.SIDE", {"cpu": 64})
    monkeypatch.setattr("limits.seconds_of", seconds)
    assert matmul_peak("none", CPU) == 2 * 64**3 / 0.5 and seen == {torch.float32}
