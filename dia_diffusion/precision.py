"""Which precision a device multiplies matrices in natively, and how fast it multiplies.

bfloat16 halves memory and multiplies speed on hardware that has instructions for it. Elsewhere torch emulates it: on a CPU
with AVX2 alone, a bfloat16 matrix product takes 40 times as long as the float32 one.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"none": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""train.mixed_precision -> torch's name of the dtype."""

CPU_INFO = Path("/proc/cpuinfo")
BF16_FLAGS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512_BF16", "bf16": "Arm BF16"}
"""Linux' name of the instructions that multiply bfloat16 -> their makers' name."""

ONEDNN_LIMIT = "ONEDNN_MAX_CPU_ISA"
"""Limits oneDNN, torch's library of CPU kernels, to older instructions."""
LIMITS_WITH_BF16 = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10", "ALL", "DEFAULT")


@dataclass(frozen=True)
class Precision:
    """A precision and why it was chosen."""

    name: str
    """none, bf16 or fp16, as in train.mixed_precision."""
    reason: str
    """Such as "this CPU has no bfloat16 arithmetic"."""

    @property
    def dtype(self) -> str:
        """float32, bfloat16 or float16."""
        return DTYPES[self.name]

    def __str__(self) -> str:
        return f"{self.dtype} ({self.reason})"


def best_precision(device: torch.device) -> Precision:
    """bf16 where the device multiplies it natively, else none, which is float32: what `auto` stands for."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):  # compute capability 8.0 and up
            return Precision("bf16", f"{name} has bfloat16 arithmetic")
        return Precision("none", f"{name} has no bfloat16 arithmetic")
    if device.type != "cpu":
        return Precision("none", f"bfloat16 was never measured on {device.type}")
    instructions = _bf16_instructions()
    if instructions is None or not torch.backends.mkldnn.is_available():
        return Precision("none", "this CPU has no bfloat16 arithmetic")
    limit = os.environ.get(ONEDNN_LIMIT, "").upper()
    if limit and not limit.startswith(LIMITS_WITH_BF16):
        return Precision("none", f"{ONEDNN_LIMIT}={limit} rules out this CPU's bfloat16 arithmetic")
    return Precision("bf16", f"this CPU has bfloat16 arithmetic, {instructions}")


def _bf16_instructions() -> str | None:
    """The instructions that multiply bfloat16 on this CPU; None where it has none or, outside Linux, nothing says so."""
    try:
        lines = CPU_INFO.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return next((name for flag, name in BF16_FLAGS.items() if flag in flags), None)


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 512, seconds: float = 0.2) -> float:
    """Floating-point operations per second of products of two (size, size) matrices, with the threads torch uses.

    Takes about `seconds`; where one product takes longer, the time of two.
    """
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))

    def elapsed(products: int) -> float:
        started = time.perf_counter()
        for _ in range(products):
            product = a @ b
        product[0, 0].item()  # waits for a GPU
        return time.perf_counter() - started

    one = elapsed(1)  # the first call picks a kernel
    one = elapsed(1) if one < seconds else one
    products = max(1, round(seconds / one))
    return 2 * size**3 * products / elapsed(products)
