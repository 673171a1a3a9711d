"""When a run compiles its network (tests/attention and tests/models compare compiled gradients)."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dia_diffusion.errors import InputError
from dia_diffusion.training import compilation
from dia_diffusion.training.compilation import check_compile, compiled, separate_kernel_cache
from dia_diffusion.training.config import Experiment, ModelConfig
from dia_diffusion.training.diffusion import DiffusionTask

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("setting", "max_steps", "compiler", "expected"),
    [
        ("auto", 5000, True, True),
        ("auto", 4999, True, False),
        ("auto", 5000, False, False),
        (True, 1, True, True),
        (False, 10**6, True, False),
    ],
)
def test_auto_compiles_where_it_pays(
    setting: Any, max_steps: int, compiler: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name if compiler and name == "g++" else None)
    model, lines = nn.Linear(2, 2), []
    assert (compiled(model, setting, max_steps, 5000, CPU, lines.append) is not model) == expected
    missing = "training without torch.compile, which needs a C++ compiler such as g++"
    assert lines == ([] if compiler else [missing])


def test_networks_of_unknown_gain_are_compiled_only_on_request() -> None:
    model = nn.Linear(2, 2)
    assert compiled(model, "auto", 10**9, None, CPU) is model
    assert DiffusionTask(Experiment(model=ModelConfig(backbone="unet2d"))).compiling_pays_after is None


@pytest.mark.parametrize(
    ("capability", "programs", "triton", "reason"),
    [
        ((9, 0), ["gcc"], True, None),
        ((7, 0), ["clang"], True, None),
        ((9, 0), ["my-cc"], True, None),
        ((6, 1), ["gcc"], True, "a GPU of compute capability 7.0 or higher, and this one has 6.1"),
        ((9, 0), ["g++"], True, "a C compiler such as gcc"),
        ((9, 0), ["gcc"], False, "the package triton"),
    ],
)
def test_auto_looks_for_what_triton_needs_on_a_gpu(
    capability: tuple[int, int],
    programs: list[str],
    triton: bool,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CC", "my-cc")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in programs else None)
    monkeypatch.setattr(compilation, "find_spec", lambda name: triton or None)
    model, lines = nn.Linear(2, 2), []
    assert (compiled(model, "auto", 1, None, GPU, lines.append) is model) == (reason is not None)
    assert lines == ([] if reason is None else [f"training without torch.compile, which needs {reason}"])
    assert compiled(model, True, 1, None, GPU, lines.append) is not model, "asked for, not looked after"


@pytest.mark.parametrize(
    ("accumulation", "device", "refused"),
    [
        (1, GPU, None),
        (2, GPU, "`train.compile` must be true, false or auto with `train.accumulation` above 1, got cuda-graphs"),
        (1, CPU, "`train.compile` must be true, false or auto without a CUDA GPU, got cuda-graphs"),
    ],
)
def test_graphs_need_a_gpu_and_no_accumulation(accumulation: int, device: torch.device, refused: str | None) -> None:
    for setting in (True, False, "auto"):
        check_compile(setting, accumulation, device)
    if refused is None:
        check_compile("cuda-graphs", accumulation, device)
    else:
        with pytest.raises(InputError) as error:
            check_compile("cuda-graphs", accumulation, device)
        assert str(error.value) == refused


def test_each_instruction_set_has_its_own_kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    for kind in ("AVX2", "AVX512"):
        # As torch sets it on import.
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "torchinductor_me"))
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda kind=kind: kind)
        separate_kernel_cache()
        folders.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert len({*folders}) == 2 and not any(folder.endswith("torchinductor_me") for folder in folders)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    separate_kernel_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")
