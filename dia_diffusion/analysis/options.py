"""What the analyses that go over images have in common: how many, which, and whom to tell."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Coverage:
    """The images and times an analysis goes over."""

    num_images: int = 64
    """The first that `seed` draws from the images a run was trained on, flipped and noised as in training."""
    num_times: int = 16
    """Spread as training draws them; classifiers have none, and are run once an image."""
    seed: int = 0
    """Decides images and noise."""
    batch_size: int = 64
    """Images a forward pass; doesn't change what is measured."""
    progress: Callable[[int], None] = lambda images: None
    """Called with how many more images the network has seen."""


DEFAULT = Coverage()
