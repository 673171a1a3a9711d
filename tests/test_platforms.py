"""Simulated macOS and Windows: no Linux-only features, no float64 on Apple's GPU; also memory with glibc."""

import ctypes
import importlib
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dia_diffusion import environment, precision
from dia_diffusion.cli.main import main
from dia_diffusion.distributed import peak_memory
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.sampling.samplers import SAMPLERS, build_scheduler
from dia_diffusion.schedulers import set_timesteps
from tests.cli.one_line import error_of
from tests.mps_stand_in import MPS, stand_in
from tests.processes import FORKED
from tests.sampling.conftest import vp_scheduler
from tests.training import classify, conftest

CPU = torch.device("cpu")


def test_the_stand_in_refuses_float64_and_computes_the_rest() -> None:
    with stand_in():
        x = torch.arange(3.0).to(MPS)
        assert x.device == MPS and (x * 2).sum().item() == 6 and (x + 1).cpu().tolist() == [1, 2, 3]
        for ask in (
            x.double,
            lambda: torch.zeros(2, dtype=torch.float64, device=MPS),
            lambda: torch.tensor([0.5], dtype=torch.float64, device=x.device),
            lambda: torch.ones(2).double().to(MPS),
        ):
            with pytest.raises(TypeError, match="float64"):
                ask()
        assert torch.ones(2).double().to(MPS, torch.float32).device == MPS


def test_no_command_asks_apples_gpu_for_float64(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIA_DIFFUSION_CACHE", str(tmp_path / "cache"))
    (tmp_path / "diffusion.yaml").write_text(conftest.TINY)
    (tmp_path / "classifier.yaml").write_text(classify.TINY)
    run = str(tmp_path / "run")
    train = ["train", "--config", str(tmp_path / "diffusion.yaml"), "--noise.loss_weighting", "min-snr"]
    train += ["--model.attention", "dia-lstm", "--train.max_steps", "1"]
    measured = ["fid", run, "--reference", "digits", "--reference-split", "test", "--num", "20", "--steps", "1"]
    metrics = ["--metrics", "kid,isc,prc", "--kid-subset-size", "10", "--bootstrap", "100"]
    classifier = ["--config", str(tmp_path / "classifier.yaml"), "--output", str(tmp_path / "classifier")]
    with stand_in():
        assert main([*train, "--output", run]) == 0
        assert "on mps" in capsys.readouterr().out
        assert main([*train, "--output", str(tmp_path / "discrete"), "--noise.schedule", "cosine"]) == 0
        flow = ["--noise.schedule", "flow", "--noise.prediction_type", "sample", "--noise.times", "log-normal"]
        assert main([*train, "--output", str(tmp_path / "flow"), *flow]) == 0
        assert main(["sample", run, "--seeds", "0", "--steps", "1", "--out", str(tmp_path / "images")]) == 0
        assert main([*measured, *metrics]) == 0
        assert main(["classify", *classifier, "--train.max_steps", "1"]) == 0


FLOWS = [f"{name} of the flow" for name, sampler in SAMPLERS.items() if sampler.flow is not None]


@pytest.mark.parametrize("name", [*SAMPLERS, *FLOWS])
def test_no_sampler_asks_apples_gpu_for_float64(name: str) -> None:
    theirs = NoiseProcess("flow", "velocity").build_scheduler() if name in FLOWS else vp_scheduler()
    scheduler = build_scheduler(name.removesuffix(" of the flow"), theirs)
    scale_model_input = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    with stand_in():
        x = torch.randn(1, 1, 2, 2).to(MPS)
        set_timesteps(scheduler, 7, MPS)
        if name in FLOWS:
            scheduler.set_begin_index(0)
        for timestep in scheduler.timesteps:
            x = scheduler.step(scale_model_input(x, timestep).sin(), timestep, x).prev_sample
        assert x.device == MPS and x.dtype == torch.float32


def test_peak_memory_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=1000))
    monkeypatch.setattr(sys, "platform", "linux")
    assert peak_memory(CPU) == 1000 * 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_memory(CPU) == 1000


def test_only_glibc_is_asked_to_keep_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *option: asked.append(option)))
    monkeypatch.setattr(sys, "platform", "darwin")
    environment.keep_freed_memory()
    assert asked == []
    monkeypatch.setattr(sys, "platform", "linux")
    environment.keep_freed_memory()
    assert len(asked) == 2
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())  # musl has no mallopt
    environment.keep_freed_memory()


def page_faults() -> int:
    """Page faults of a tensor of 64 MiB, after larger ones have been freed.

    To align a tensor, glibc looks for a few more bytes than it takes, so a freed block of exactly its size may not fit.
    """
    blocks = [torch.ones((64 << 20) + 4096, dtype=torch.uint8) for _ in range(3)]
    del blocks
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def in_fork(work: Callable[[Path], None], file: Path) -> None:
    process = FORKED.Process(target=work, args=(file,))
    process.start()
    process.join()


def count_page_faults(file: Path) -> None:
    usual = page_faults()
    environment.keep_freed_memory()
    file.write_text(f"{usual} {page_faults()}")


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_large_blocks_are_used_again(tmp_path: Path) -> None:
    in_fork(count_page_faults, tmp_path / "faults")
    usual, kept = map(int, (tmp_path / "faults").read_text().split())
    pages = (64 << 20) // 4096
    if usual < pages // 2:
        pytest.skip("this C library, or huge pages, keep blocks anyway")
    assert kept < pages // 100


def test_a_cpu_without_proc_cpuinfo_computes_in_float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "none")
    assert precision.best_precision(CPU).dtype == precision.best_precision(MPS).dtype == "float32"


def test_commands_on_windows_name_wsl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert "on Windows, run it in WSL" in error_of(["train", "--config", "digits_uvit_cpu"], capsys)


def import_as_on_windows(file: Path) -> None:
    """Imports the package again, and packages that use fcntl or know its features, without modules Windows lacks."""
    anew = ("dia_diffusion", "filelock", "torch_fidelity")
    for name in [name for name in sys.modules if name.partition(".")[0] in anew]:
        del sys.modules[name]
    sys.modules.update(fcntl=None, resource=None)  # type: ignore[arg-type]
    package = importlib.import_module("dia_diffusion")
    importlib.import_module("dia_diffusion.distributed")
    said = [f"{package.UViT.__name__} {package.UViTPipeline.__name__}"]
    for name in ("dia_diffusion.training.trainer", "dia_diffusion.evaluation.evaluate"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            said.append(str(error))
    file.write_text("\n".join(said))


def test_on_windows_models_are_imported_and_the_rest_names_wsl(tmp_path: Path) -> None:
    in_fork(import_as_on_windows, tmp_path / "said")
    models, *refusals = (tmp_path / "said").read_text().splitlines()
    assert models == "UViT UViTPipeline"
    assert len(refusals) == 2 and all("on Windows, run it in WSL" in refusal for refusal in refusals)
