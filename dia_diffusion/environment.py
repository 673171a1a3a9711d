"""The machine: versions, device, cores, and malloc settings."""

import ctypes
import os
import platform
import sys
from importlib import metadata

__version__ = "0.1.0"

RECORDED_PACKAGES = ("torch", "torchvision", "diffusers", "accelerate", "torch-fidelity", "numpy")


def installed_versions() -> dict[str, str]:
    """package -> version, for the packages that a measured number depends on."""
    return {"dia-diffusion": __version__} | {name: metadata.version(name) for name in RECORDED_PACKAGES}


def environment(processes: int = 1) -> dict[str, str]:
    """Versions, device and system, as text to read.

    Args:
        processes: number of processes of the launch, each with its own device.
    """
    return {"python": platform.python_version(), **installed_versions()} | {
        "device": device_name() if processes == 1 else f"{processes} x {device_name()}",
        "system": f"{platform.system()} {platform.machine()}",
    }


def device_name() -> str:
    """This machine's GPU, or its CPU and the number of threads that torch uses."""
    import torch  # slow to import, and not needed for the versions

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"


def usable_cores() -> int:
    """CPU cores that this process may run on; outside Linux, all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Parameters of glibc's mallopt; see malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Lets glibc keep large freed blocks for reuse; does nothing with other C libraries.

    By default glibc maps each block above 32 MiB when it is allocated and unmaps it when it is freed. A training step
    frees and allocates gigabytes of such activations, and the kernel clears every page of them.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, LARGEST)
