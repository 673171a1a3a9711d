"""Each batch is read while the previous one is measured."""

from collections.abc import Sequence
from threading import Event

import pytest
import torch

from dia_diffusion.evaluation.feature_store import read_ahead


def test_the_next_part_is_read_while_the_caller_works() -> None:
    parts = [range(0, 3), range(3, 6), range(6, 7)]
    started = [Event() for _ in parts]

    def read(part: Sequence[int]) -> torch.Tensor:
        started[part[0] // 3].set()
        return torch.tensor(part)

    found = []
    for index, batch in enumerate(read_ahead(read, parts)):
        found.append(batch)
        assert index == len(parts) - 1 or started[index + 1].wait(10)
        assert index + 2 >= len(parts) or not started[index + 2].wait(0.05), "one batch ahead, no more"
    assert torch.cat(found).tolist() == list(range(7))
    assert list(read_ahead(read, [])) == []


def test_what_reading_raises_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(lambda part: torch.tensor(1 / part[0]), [range(0, 1), range(1, 2)]))
