"""Randomness as a function of (seed, step, image): nothing random is ever saved, so any step can be drawn again.

A step's draws are those of its global batch; each process takes its slice. So they depend on neither the number of
processes, nor the micro-batches, nor what ran before.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# Independent streams of one seed. A stream's number is part of what a seed means: never renumber.
WEIGHTS, ORDER, STEP, MODEL, AUGMENT = range(5)


def derive(seed: int, stream: int, number: int = 0) -> int:
    """A seed for a generator, mixed from (seed, stream, number)."""
    return int(np.random.SeedSequence([seed, stream, number]).generate_state(1, np.uint64)[0] >> 1)


def generator(seed: int, stream: int, number: int = 0) -> torch.Generator:
    """A CPU generator that starts at (seed, stream, number)."""
    return torch.Generator().manual_seed(derive(seed, stream, number))


@dataclass(frozen=True)
class StepDraws:
    """What is random in one step, for the images of the global batch or a slice of it."""

    indices: np.ndarray  # (B,) int64, which images
    flips: Tensor  # (B,) bool
    uniform: Tensor  # (B,) float32 in [0, 1), for the times
    drop_label: Tensor  # (B,) float32 in [0, 1), dropped below the rate
    noise: Tensor  # (B, C, H, W) float32

    def slice(self, start: int, stop: int) -> "StepDraws":
        """The draws of images start..stop of the batch."""
        part = slice(start, stop)
        return StepDraws(
            self.indices[part], self.flips[part], self.uniform[part], self.drop_label[part], self.noise[part]
        )


def draw_step(seed: int, step: int, batch_size: int, num_images: int, shape: tuple[int, ...]) -> StepDraws:
    """The draws of the global batch (batch_size images of this shape) of a step, counted from 0."""
    draw = generator(seed, STEP, step)
    return StepDraws(
        indices=image_order(seed, step * batch_size, batch_size, num_images),
        flips=torch.rand(batch_size, generator=draw, dtype=torch.float32) < 0.5,
        uniform=torch.rand(batch_size, generator=draw, dtype=torch.float32),
        drop_label=torch.rand(batch_size, generator=draw, dtype=torch.float32),
        noise=torch.randn(batch_size, *shape, generator=draw, dtype=torch.float32),
    )


def image_order(seed: int, first: int, count: int, num_images: int) -> np.ndarray:
    """Indices of the first..first + count - 1st images seen in training: each epoch a new permutation of all."""
    seen = np.arange(first, first + count)
    epochs, places = np.divmod(seen, num_images)
    order = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        order[here] = _permutation(seed, int(epoch), num_images)[places[here]]
    return order


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_images: int) -> np.ndarray:
    return torch.randperm(num_images, generator=generator(seed, ORDER, epoch)).numpy()
