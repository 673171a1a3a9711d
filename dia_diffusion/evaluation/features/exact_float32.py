"""Full float32 in products and convolutions, whatever faster and coarser precision is switched on around them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

NEW_SETTINGS = hasattr(torch.backends, "fp32_precision")
"""Whether torch (2.9 and newer) has `fp32_precision`, beside which reading `allow_tf32` can raise."""


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 or bfloat16 in place of float32, and cuDNN's deterministic kernels; afterwards everything is as before.

    Inside, `allow_tf32` may raise when read, as torch has it after `fp32_precision` was set.
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
    """Where, which and what, in this order: an operator without a precision of its own reads as its backend's, and that
    as the one for all, so each is read only once what it falls back on is set."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    kernels = [(cudnn, "enabled", True), (cudnn, "deterministic", True), (cudnn, "benchmark", False)]
    if not NEW_SETTINGS:
        return [*kernels, (cudnn, "allow_tf32", False), (cuda.matmul, "allow_tf32", False)]
    mkldnn = torch.backends.mkldnn
    operators = [cudnn.conv, cudnn.rnn, cuda.matmul, mkldnn.conv, mkldnn.rnn, mkldnn.matmul]  # type: ignore[attr-defined]
    return [
        *kernels,
        (torch.backends, "fp32_precision", "none"),
        *((place, "fp32_precision", "ieee") for place in (cudnn, mkldnn, *operators)),
    ]
