"""Fixtures for trainings and child processes, which sweeps consist of."""

from tests.processes import children
from tests.training.conftest import tiny, train

__all__ = ["children", "tiny", "train"]
