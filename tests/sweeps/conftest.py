"""The trainings' fixtures, for the studies that are made of them."""

from tests.training.conftest import tiny, train

__all__ = ["tiny", "train"]
