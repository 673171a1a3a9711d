"""Which precisions a device supports natively for matrix products, and how fast those are.

bfloat16 saves memory and time on hardware that has instructions for it. Elsewhere torch emulates it: on a CPU with only
AVX2, a bfloat16 matrix product takes 40 times as long as the float32 one.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dia_diffusion.errors import InputError

Name = Literal["none", "bf16", "fp16"]
DTYPES: dict[Name, str] = {"none": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""train.mixed_precision -> torch's name of the dtype."""

CPU_INFO = Path("/proc/cpuinfo")
BF16_FLAGS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512_BF16", "bf16": "Arm BF16"}
"""Linux's name of the instructions that multiply bfloat16 -> the vendor's name."""

ONEDNN_LIMIT = "ONEDNN_MAX_CPU_ISA"
"""Limits oneDNN, torch's library of CPU kernels, to older instructions."""
LIMITS_WITH_BF16 = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10", "ALL", "DEFAULT")


@dataclass(frozen=True)
class Precision:
    """A precision and why it was chosen."""

    name: Name
    """none, bf16 or fp16, as in train.mixed_precision."""
    reason: str
    """For example "this CPU has no bfloat16 arithmetic"."""

    @property
    def dtype(self) -> str:
        """float32, bfloat16 or float16."""
        return DTYPES[self.name]

    def __str__(self) -> str:
        return f"{self.dtype} ({self.reason})"


def best_precision(device: torch.device) -> Precision:
    """What `auto` stands for: bf16 if the device multiplies it natively, else none, which is float32."""
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
    """The instructions that multiply bfloat16 on this CPU; None if there are none or this isn't Linux."""
    try:
        lines = CPU_INFO.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return next((name for flag, name in BF16_FLAGS.items() if flag in flags), None)


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 512, seconds: float = 0.2) -> float:
    """Floating-point operations per second of products of two (size, size) matrices, with torch's current threads.

    Takes about `seconds`, or the time of two products if one takes longer.
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


def training_device() -> torch.device:
    """The device that Accelerate will give this process, known before Accelerate starts."""
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "y", "on"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def training_precision(recipe: Literal["auto"] | Name, device: torch.device, began_in: Name | None = None) -> Precision:
    """The precision a run trains in.

    Args:
        recipe: train.mixed_precision: auto, none, bf16 or fp16.
        device: the device that the run trains on.
        began_in: the precision in which the resumed run began; None for a new run.

    The recipe decides. If it says auto, the order is: `accelerate launch --mixed_precision`, the precision in which the
    run began, the best precision of the device. The launcher's `no` is its default and is ignored.

    Raises:
        InputError: fp16 without a CUDA GPU, or the launcher's precision isn't supported.
    """
    launcher: Any = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launcher not in ("no", "bf16", "fp16"):
        raise InputError(f"`--mixed_precision` of accelerate launch must be no, bf16 or fp16, got {launcher}")
    if recipe != "auto":
        unused = f", not {launcher} as accelerate launch says" if launcher not in ("no", recipe) else ""
        chosen = Precision(recipe, f"as train.mixed_precision says{unused}")
    elif launcher != "no":
        chosen = Precision(launcher, "as accelerate launch says")
    elif began_in is not None:
        chosen = Precision(began_in, "as this run began")
    else:
        chosen = best_precision(device)
    if chosen.name == "fp16" and device.type != "cuda":
        raise InputError(
            f"`train.mixed_precision` must be auto, none or bf16 on a {device.type.upper()}, got fp16 "
            f"({chosen.reason}), which needs a CUDA GPU"
        )
    return chosen


def in_precision(experiment: Any, precision: Precision) -> Any:
    """A train or classify recipe with train.mixed_precision set to a resolved precision."""
    train = experiment.train.model_copy(update={"mixed_precision": precision.name})
    return experiment.model_copy(update={"train": train})


def slow_warning(precision: Precision, device: torch.device) -> str | None:
    """One line on how slow bf16 is on a device without bfloat16 arithmetic; None if it isn't slow."""
    if precision.name != "bf16" or best_precision(device).name == "bf16":
        return None
    rates = [matmul_rate(dtype, device) for dtype in (torch.float32, torch.bfloat16)]
    float32, bfloat16 = (f"{rate / 1e9:.3g} GFLOP/s" for rate in rates)
    return (
        f"warning: {precision}: this device multiplies matrices {rates[0] / rates[1]:.0f} times slower in it than in "
        f"float32 ({bfloat16} against {float32})"
    )


@contextmanager
def exact_float32() -> Iterator[None]:
    """Disables TF32 and bfloat16 in place of float32, and uses cuDNN's deterministic kernels; restored at exit.

    Settings are read and written under their new names, `fp32_precision`. After a mix of old and new names, reading the
    old `allow_tf32` raises; this may also happen inside the context.
    """
    changed: list[tuple[Any, str, Any]] = []
    try:
        for place, name, value in _settings():
            before = getattr(place, name)
            if before != value:
                setattr(place, name, value)
                changed.append((place, name, before))
        yield
    finally:
        for place, name, before in reversed(changed):
            setattr(place, name, before)


def _settings() -> list[tuple[Any, str, Any]]:
    """(object, attribute, value), in the order to set them. An operator without its own precision falls back on its
    backend's, and that on the global one, so each is read only after its fallback is set."""
    cudnn, cuda, mkldnn = torch.backends.cudnn, torch.backends.cuda, torch.backends.mkldnn
    operators = [cudnn.conv, cudnn.rnn, cuda.matmul, mkldnn.conv, mkldnn.rnn, mkldnn.matmul]  # type: ignore[attr-defined]
    return [
        (cudnn, "enabled", True),
        (cudnn, "deterministic", True),
        (cudnn, "benchmark", False),
        (torch.backends, "fp32_precision", "none"),
        *((place, "fp32_precision", "ieee") for place in (cudnn, mkldnn, *operators)),
    ]
