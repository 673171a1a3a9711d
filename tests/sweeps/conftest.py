"""Fixtures of trainings and of child processes, for the sweeps that are made of them."""

from tests.processes import children
from tests.training.conftest import tiny, train

__all__ = ["children", "tiny", "train"]
