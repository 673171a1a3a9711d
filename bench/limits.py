"""What the machine allows: the rate of its matrix products, and how many operations a run needs."""

import gc
from collections.abc import Callable

import torch
from interleave import STEPS, block_size, seconds_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": torch.float32}
SIDE = {"cpu": 4096, "cuda": 8192}
"""Of the square matrices; larger ones gave no higher rate."""


def matmul_peak(precision: str, device: torch.device, tries: int = 5) -> float:
    """Operations a second of large matrix products in this precision, the fastest of a few blocks of them.

    Products of float32 matrices are taken under torch's settings of the moment, as those of a training are: in float32,
    or in TF32 where that was switched on.
    """
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=DTYPES[precision]) for _ in range(2))
    block = block_size(seconds_of(lambda: a @ b, device), device, STEPS)
    return 2 * side**3 / min(seconds_of(lambda: a @ b, device, block) for _ in range(tries))


def flops_of(run: Callable[[], object]) -> float:
    """Operations in the matrix products and convolutions of one run."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # fused attention on a CPU is not counted
        run()
    return float(counter.get_total_flops())


def memory_now(device: torch.device) -> int:
    """Bytes held: of the GPU's memory on a GPU, else the process's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return _process_memory("VmRSS")


def memory_peak(device: torch.device) -> int:
    """The most bytes held so far."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _process_memory("VmHWM")


def _process_memory(name: str) -> int:
    """As Linux tells it of this process alone: getrusage's peak is the starting process's where that was higher."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
