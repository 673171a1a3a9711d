"""Random numbers of training as a function of (seed, stream, position): no random state is saved.

They come from Philox4x64-10, a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3"), through numpy's `Philox.random_raw`, which numpy keeps stable. The key is (seed, stream). The counter is a
position: image i of step s with batch size B is at s * B + i, and every position has its own words. So the numbers of
any slice of a batch are contiguous in the stream, no two images of a training share numbers, and nothing depends on the
number of processes or micro-batches, or on what ran before.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

RANDOMNESS = 2
"""Version of the streams below, except for initial weights. Version 1 (checkpoints without a version) was torch's CPU
generator, seeded with 32 bits for each step."""

# Independent streams of one seed. Never renumber: the numbers decide what a seed gives.
WEIGHTS, ORDER, STEP, MODEL, AUGMENT, NOISE, DEPTH = range(7)

WORDS_AT_ONCE = 1 << 14  # Box-Muller's float64 intermediates then stay in the L2 cache

Words = npt.NDArray[np.uint64]


def derive(seed: int, stream: int, number: int = 0) -> int:
    """A seed for torch's generator, mixed from (seed, stream, number)."""
    return int(np.random.SeedSequence([seed, stream, number]).generate_state(1, np.uint64)[0] >> 1)


def raw_words(seed: int, stream: int, first: int, count: int, each: int) -> Words:
    """Words (count, each) of the positions first..first + count - 1, with `each` words per position."""
    blocks = math.ceil(each / 4)  # each counter value gives four words
    words = _philox(seed, stream, first * blocks).random_raw(count * blocks * 4)
    return words.reshape(count, blocks * 4)[:, :each]


def uniforms(seed: int, stream: int, first: int, count: int, each: int) -> Tensor:
    """Uniform numbers (count, each), float32 in [0, 1): the upper 24 bits of each word's upper and lower half."""
    words = raw_words(seed, stream, first, count, math.ceil(each / 2))
    halves = np.stack([words >> 32, words & 0xFFFFFFFF], axis=-1).reshape(count, 2 * words.shape[1])[:, :each]
    return torch.from_numpy((halves >> 8).astype(np.float32) * np.float32(2**-24))


def normals(seed: int, stream: int, first: int, count: int, each: int) -> Tensor:
    """Standard normal numbers (count, each), float32: a Box-Muller pair from each word's halves.

    They are computed in float64, where logarithms and tangents may differ in the last bits between CPUs and versions of
    numpy. Rounding to float32 hides that except for about one number in 10^8, which then differs by one ulp.
    """
    blocks = math.ceil(each / 8)
    philox = _philox(seed, stream, first * blocks)
    numbers = np.empty((count * blocks * 4, 2), dtype=np.float32)
    for start in range(0, len(numbers), WORDS_AT_ONCE):
        pairs = numbers[start : start + WORDS_AT_ONCE]
        words = philox.random_raw(len(pairs))
        radius = np.sqrt(-2 * np.log(((words >> 32) + 0.5) * 2**-32))
        # cos and sin of an angle from the tangent of half of it, since numpy's tan is several times as fast.
        tangent = np.tan((words & 0xFFFFFFFF) * (math.pi * 2**-32))
        square = tangent * tangent
        radius /= 1 + square
        pairs[:, 0], pairs[:, 1] = radius * (1 - square), 2 * radius * tangent
    return torch.from_numpy(np.ascontiguousarray(numbers.reshape(count, blocks * 8)[:, :each]))


def _philox(seed: int, stream: int, block: int) -> np.random.Philox:
    """A generator that continues with the words of counter `block` + 1: numpy increments before it generates."""
    return np.random.Philox(key=np.array([seed, stream], dtype=np.uint64), counter=block)


@dataclass(frozen=True)
class StepDraws:
    """The random numbers of one step, for the images of the global batch or a slice of it."""

    indices: np.ndarray  # (B,) int64, which images
    flips: Tensor  # (B,) bool
    uniform: Tensor  # (B,) float32 in [0, 1), for the times
    drop_label: Tensor  # (B,) float32 in [0, 1), dropped below the rate
    noise: Tensor  # (B, C, H, W) float32
    depth: Tensor | None = None  # (B, blocks, 2) float32 in [0, 1), for stochastic depth; see UViT.forward

    def slice(self, start: int, stop: int) -> "StepDraws":
        """The draws of images start..stop."""
        part = slice(start, stop)
        return StepDraws(
            self.indices[part],
            self.flips[part],
            self.uniform[part],
            self.drop_label[part],
            self.noise[part],
            None if self.depth is None else self.depth[part],
        )


def draw_step(
    seed: int,
    step: int,
    batch_size: int,
    num_images: int,
    shape: tuple[int, ...],
    start: int = 0,
    stop: int | None = None,
    num_blocks: int = 0,
) -> StepDraws:
    """The draws of images start..stop (None: to the end) of the global batch of a step, counted from 0.

    batch_size: of the global batch.
    shape: (C, H, W) of an image.
    num_blocks: blocks of a network with stochastic depth; 0 draws nothing for it.
    """
    first, count = step * batch_size + start, (batch_size if stop is None else stop) - start
    flip, uniform, drop_label = uniforms(seed, STEP, first, count, 3).unbind(dim=1)
    noise = normals(seed, NOISE, first, count, math.prod(shape)).reshape(count, *shape)
    depth = uniforms(seed, DEPTH, first, count, 2 * num_blocks).reshape(count, num_blocks, 2) if num_blocks else None
    return StepDraws(image_order(seed, first, count, num_images), flip < 0.5, uniform, drop_label, noise, depth)


def dropout_seed(seed: int, step: int, process: int) -> int:
    """A seed for torch's generators, for the dropout masks of a process in a step.

    Below 2^32, since a CPU generator ignores higher bits. A process has different seeds at any two steps; the seeds of
    two processes or trainings may coincide by chance.
    """
    return (int(raw_words(seed, MODEL, process, 1, 1)[0, 0]) + step) % 2**32


def image_order(seed: int, first: int, count: int, num_images: int) -> np.ndarray:
    """Indices of the images seen at positions first..first + count - 1; each epoch is a new permutation of all."""
    seen = np.arange(first, first + count)
    epochs, places = np.divmod(seen, num_images)
    order = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        order[here] = _permutation(seed, int(epoch), num_images)[places[here]]
    return order


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_images: int) -> np.ndarray:
    return np.argsort(raw_words(seed, ORDER, epoch, 1, num_images)[0], kind="stable")
