"""`dia-diffusion env`: the lines of a bug report, on this machine and on simulated ones."""

import getpass
import os
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from dia_diffusion import precision
from dia_diffusion.cli import env
from dia_diffusion.cli.main import main
from dia_diffusion.environment import usable_cores
from dia_diffusion.precision import Precision


def lines_of(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    capsys.readouterr()
    assert main(["env"]) == 0
    shown = capsys.readouterr().out.splitlines()
    return dict(line.split(": ", 1) for line in shown)


def test_a_report_says_what_it_ran_on_and_nothing_private(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CXX", sys.executable)  # a path
    lines = lines_of(capsys)
    for package in ("torch", "diffusers", "accelerate", "numpy"):
        assert lines[package] == metadata.version(package)
    assert f"{usable_cores()} of {os.cpu_count()} cores usable, {torch.get_num_threads()} threads" in lines["CPU"]
    assert lines["float32 matrix product"].endswith(" GFLOP/s") and lines["bfloat16 matrix product"].endswith("/s")
    assert lines["mixed_precision auto"].startswith(("float32 (", "bfloat16 (")) and lines["device"]
    assert lines["C++ compiler"] == Path(sys.executable).name and "OMP_NUM_THREADS=1" in lines["variables"]
    report = "\n".join(lines.values())
    for private in (str(Path.home()), str(Path.cwd()), sys.prefix, socket.gethostname(), f"/{getpass.getuser()}"):
        assert private not in report


@pytest.mark.parametrize("native", [True, False])
def test_an_emulated_product_takes_under_a_second_at_a_billion_operations_per_second(
    native: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes: dict[torch.dtype, int] = {}

    def rate(dtype: torch.dtype, device: torch.device, size: int) -> float:
        sizes[dtype] = size
        return 1e9

    monkeypatch.setattr(precision, "matmul_rate", rate)
    monkeypatch.setattr(precision, "best_precision", lambda _: Precision("bf16" if native else "none", "simulated"))
    assert lines_of(capsys)["bfloat16 matrix product"] == "1.0 GFLOP/s"
    seconds = 3 * 2 * sizes[torch.bfloat16] ** 3 / 1e9  # three products: matmul_rate repeats a slow one three times
    assert (seconds < 1) is not native
    assert sizes[torch.float32] > 256


def test_a_device_that_cannot_multiply_is_part_of_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*_: object) -> float:
        raise TypeError("BFloat16 is not supported on MPS")

    monkeypatch.setattr(precision, "matmul_rate", refuses)
    assert lines_of(capsys)["bfloat16 matrix product"] == "failed: BFloat16 is not supported on MPS"


def test_the_name_of_a_cpu_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    assert env.cpu_model()
    monkeypatch.setattr(sys, "platform", "darwin")
    asked = subprocess.CompletedProcess([], 0, stdout="Apple M2\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: asked)
    assert env.cpu_model() == "Apple M2"


def test_cores_where_the_system_has_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert usable_cores() == 8
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1
