"""All tests: one thread each, so that two run side by side, and no state of Accelerate from one to the next."""

from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
