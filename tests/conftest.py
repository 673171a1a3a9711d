"""All tests: one thread each, so that two run side by side, and no state of Accelerate from one to the next."""

from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState

from dia_diffusion.training.compilation import separate_kernel_cache

torch.set_num_threads(1)
separate_kernel_cache()


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
