"""Several processes with GPUs train the same model as one process."""

import subprocess
from pathlib import Path

import pytest
import torch

from tests.gpu.conftest import ON_CPU, losses
from tests.training.test_processes import torchrun

# NCCL refuses two processes on one GPU; gloo transfers their tensors over the CPU.
OVER_GLOO = """
from accelerate.state import PartialState
prepare = PartialState._prepare_backend
PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", prepare(self, *args, **kwargs)[1])
"""


def run(tmp_path: Path, name: str, processes: int, setup: str = "") -> list[float]:
    """The losses of 20 steps on this number of processes."""
    options = ["--train.compile", "false", "--train.max_steps", "20", "--train.checkpoint_every", "20"]
    command, environment = torchrun(tmp_path, name, processes, *options, setup=setup)
    if not ON_CPU:
        del environment["ACCELERATE_USE_CPU"]
    if setup:  # both processes use GPU 0, but Accelerate gives DDP a GPU per process unless it is kept from it
        environment["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    return losses(tmp_path / name)


def test_two_processes_share_a_gpu_over_gloo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_CPU:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert run(tmp_path, "two", 2, OVER_GLOO) == pytest.approx(run(tmp_path, "one", 1), rel=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus_over_nccl(tmp_path: Path) -> None:
    assert run(tmp_path, "two", 2) == pytest.approx(run(tmp_path, "one", 1), rel=1e-4)
