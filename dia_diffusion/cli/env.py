"""`dia-diffusion env`: what a bug report starts with, as `key: value` lines."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from dia_diffusion.environment import installed_versions, usable_cores
from dia_diffusion.errors import first_line
from dia_diffusion.validation import Strict

if TYPE_CHECKING:
    import torch

# Variables that change speed or results. None of them holds a path.
VARIABLES = (
    "ACCELERATE_USE_CPU",
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "PYTORCH_ENABLE_MPS_FALLBACK",
)
# Sides of the square matrices that are multiplied: large enough to keep the device busy, small where bfloat16 is
# emulated at about 1 GFLOP/s.
CPU_SIZE, GPU_SIZE, EMULATED_SIZE = 1024, 4096, 256


class Options(Strict):
    """Prints versions, devices, precision and speed of this machine. Paste it into a bug report."""


def run(_: Options) -> None:
    """Prints each line as soon as it is known."""
    for key, value in describe():
        print(f"{key}: {value}")


def describe() -> Iterator[tuple[str, str]]:
    """Pairs of key and value, one line each. No value holds a path, or the name of the user or host."""
    import torch

    from dia_diffusion.precision import best_precision, training_device
    from dia_diffusion.training.compilation import find_compiler

    yield from installed_versions().items()
    yield "python", platform.python_version()
    yield "system", platform.platform()
    cores = f"{usable_cores()} of {os.cpu_count()} cores usable, {torch.get_num_threads()} threads"
    yield "CPU", f"{cpu_model()}, {cores}, kernels for {torch.backends.cpu.get_cpu_capability()}"
    yield "memory", gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    yield "CUDA", torch.version.cuda or torch.version.hip or "not in this build of torch"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield f"GPU {index}", f"{gpu.name}, {gib(gpu.total_memory)}, compute capability {gpu.major}.{gpu.minor}"
    device = training_device()
    precision = best_precision(device)
    yield "device", device.type
    yield "mixed_precision auto", str(precision)
    compiler = find_compiler()
    yield "C++ compiler", os.path.basename(compiler) if compiler else "not found; torch.compile needs one on a CPU"
    yield "triton", triton_version()
    for dtype in (torch.float32, torch.bfloat16):
        native = dtype == torch.float32 or precision.name == "bf16"
        yield f"{dtype} matrix product".removeprefix("torch."), matmul_speed(dtype, device, native)
    yield "variables", ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ) or "none set"


def matmul_speed(dtype: "torch.dtype", device: "torch.device", native: bool) -> str:
    """Such as "42.1 GFLOP/s"; the error if the device can't multiply such matrices."""
    from dia_diffusion.precision import matmul_rate

    size = EMULATED_SIZE if not native else CPU_SIZE if device.type == "cpu" else GPU_SIZE
    try:
        return f"{matmul_rate(dtype, device, size) / 1e9:,.1f} GFLOP/s"
    except (RuntimeError, TypeError) as error:
        return f"failed: {first_line(error)}"


def cpu_model() -> str:
    """The CPU's model name, or its architecture if that is unknown."""
    try:
        if sys.platform == "darwin":
            words = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, subprocess.CalledProcessError):
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def triton_version() -> str:
    """The version of triton, which compiles for GPUs."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not installed"


def gib(size: int) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.1f} GiB"
