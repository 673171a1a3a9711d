"""Full float32 in products and convolutions, whatever faster and coarser precision is switched on around them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 or bfloat16 in place of float32, and cuDNN's deterministic kernels; afterwards everything is as before.

    Settings are read and written by their new names, `fp32_precision`: after a mix of both kinds, reading the old
    `allow_tf32` raises, and it may raise inside.
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
    cudnn, cuda, mkldnn = torch.backends.cudnn, torch.backends.cuda, torch.backends.mkldnn
    operators = [cudnn.conv, cudnn.rnn, cuda.matmul, mkldnn.conv, mkldnn.rnn, mkldnn.matmul]  # type: ignore[attr-defined]
    return [
        (cudnn, "enabled", True),
        (cudnn, "deterministic", True),
        (cudnn, "benchmark", False),
        (torch.backends, "fp32_precision", "none"),
        *((place, "fp32_precision", "ieee") for place in (cudnn, mkldnn, *operators)),
    ]
