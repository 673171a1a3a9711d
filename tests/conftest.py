"""For all tests: one thread each, so that two can run in parallel, and no Accelerate state carried between tests."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from matplotlib.figure import Figure

from dia_diffusion.training.compilation import separate_kernel_cache

torch.set_num_threads(1)
separate_kernel_cache()


def pytest_configure(config: pytest.Config) -> None:
    """Only `-m gpu` uses a GPU: the other tests compare with exact results of the CPU, and a GPU would compile each."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def coarse_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves figures at low resolution without layout, which take most of the time; test_figures.py saves full ones."""
    savefig = Figure.savefig

    def coarse(self: Figure, *args: Any, **kwargs: Any) -> None:
        self.set_layout_engine("none")
        savefig(self, *args, **{**kwargs, "dpi": 40})

    monkeypatch.setattr(Figure, "savefig", coarse)
