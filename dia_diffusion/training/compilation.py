"""Decides whether a run compiles its network: if that saves more time than it takes (`bench/run.py --suite train`)."""

import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from dia_diffusion.errors import InputError

CUDA_GRAPHS = "cuda-graphs"
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def check_compile(setting: Any, accumulation: int, device: torch.device) -> None:
    """Raises InputError for a train.compile that is impossible with this accumulation or on this device."""
    if setting != CUDA_GRAPHS:
        return
    if accumulation > 1:
        # Gradients are in the graphs' memory, which the next micro-batch overwrites.
        raise InputError(
            f"`train.compile` must be true, false or auto with `train.accumulation` above 1, got {CUDA_GRAPHS}"
        )
    if device.type != "cuda":
        raise InputError(f"`train.compile` must be true, false or auto without a CUDA GPU, got {CUDA_GRAPHS}")


def compiled(
    model: nn.Module,
    setting: Any,
    max_steps: int,
    pays_after: int | None,
    device: torch.device,
    message: Callable[[str], None] = lambda line: None,
) -> nn.Module:
    """The network that a run trains, with the same parameters.

    Args:
        setting: train.compile. "auto" is on with a CUDA GPU, and on a CPU for runs that are long enough. Their total
            length counts, so that a resumed run computes as before.
        pays_after: optimizer steps on a CPU after which compiling such a model has paid off; None: unknown.
        message: called with a line on why "auto" doesn't compile a model for which that would pay off.
    """
    separate_kernel_cache()
    if setting == CUDA_GRAPHS:
        return cast(nn.Module, torch.compile(model, mode="reduce-overhead"))  # it launches few graphs, not many kernels
    if setting == "auto":
        setting = device.type == "cuda" or (pays_after is not None and max_steps >= pays_after)
        if setting and (missing := _missing_for_compilation(device)) is not None:
            message(f"training without torch.compile, which needs {missing}")
            setting = False
    return cast(nn.Module, torch.compile(model)) if setting else model


def separate_kernel_cache() -> None:
    """Gives each CPU instruction set a separate torch.compile cache, unless the user has chosen one.

    torch's cache key lacks the instruction set, and kernels for the wrong one corrupt memory: on machines that share a
    cache, or if ATEN_CPU_CAPABILITY changes.
    """
    current = Path(os.environ.get(CACHE_VARIABLE, ""))
    if current != Path() and current.parent != Path(tempfile.gettempdir()):  # torch's default location
        return
    kind = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "_")
    os.environ[CACHE_VARIABLE] = str(Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}_{kind}")


def _missing_for_compilation(device: torch.device) -> str | None:
    """What torch.compile needs on this device but lacks, so that its first step would fail; None if nothing."""
    if device.type != "cuda":
        return None if find_compiler() else "a C++ compiler such as g++"
    capability = torch.cuda.get_device_capability(device)
    if capability < (7, 0):
        return f"a GPU of compute capability 7.0 or higher, and this one has {capability[0]}.{capability[1]}"
    if find_spec("triton") is None:
        return "the package triton"
    # Triton compiles its own C module at the first kernel.
    return None if find_compiler("CC", ("gcc", "clang")) else "a C compiler such as gcc"


def find_compiler(variable: str = "CXX", names: tuple[str, ...] = ("g++", "clang++")) -> str | None:
    """The compiler given by an environment variable, else the first of these names that exists; None if there is none.

    By default the C++ compiler, which torch.compile uses on a CPU.
    """
    return next((name for name in (os.environ.get(variable, ""), *names) if name and shutil.which(name)), None)
