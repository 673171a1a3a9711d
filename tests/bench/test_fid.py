"""Contenders for a distance agree in exact float32, and are timed as they come."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fid import side_by_side

CPU = torch.device("cpu")
backends: Any = torch.backends


@pytest.fixture
def coarse() -> Iterator[None]:
    """Convolutions in bfloat16 where a CPU has it: what TF32 is on a GPU."""
    backends.mkldnn.conv.fp32_precision = "bf16"
    yield
    backends.mkldnn.conv.fp32_precision = "none"


def test_a_coarse_contender_is_compared_in_exact_float32_and_timed_coarse(coarse: None) -> None:
    draw = torch.Generator().manual_seed(0)
    images, weight = (torch.randn(*shape, generator=draw) for shape in ((4, 16, 32, 32), (16, 16, 3, 3)))
    exact = float(F.conv2d(images.double(), weight.double()).square().mean() - 141.9)
    settings: list[str] = []

    def theirs() -> float:
        settings.append(backends.mkldnn.conv.fp32_precision)
        return float(F.conv2d(images, weight).double().square().mean() - 141.9)

    found = side_by_side("a convolution", {"ours": lambda: exact, "theirs": theirs}, 1, 2, CPU, lambda text: None)
    assert settings == ["ieee", "bf16", "bf16", "bf16"] and len(found.timings[1].seconds) == 2


def test_contenders_that_disagree_are_named() -> None:
    with pytest.raises(AssertionError, match=r"they disagree: .*'theirs': 1.01"):
        side_by_side("two numbers", {"ours": lambda: 1.0, "theirs": lambda: 1.01}, 1, 1, CPU, lambda text: None)
