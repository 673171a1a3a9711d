"""Randomness depends only on (seed, step, image); words are Philox's, numbers have the right distributions."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dia_diffusion.training.augmentation import draw_images
from dia_diffusion.training.randomness import (
    AUGMENT,
    DEPTH,
    MODEL,
    NOISE,
    ORDER,
    STEP,
    WEIGHTS,
    WORDS_AT_ONCE,
    derive,
    draw_step,
    dropout_seed,
    image_order,
    normals,
    raw_words,
    uniforms,
)

WORD = 2**64 - 1


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Philox4x64-10 as defined by Salmon et al. 2011, in Python integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        high, low = divmod(0xD2E7470EE14C6C93 * a, 2**64)
        other_high, other_low = divmod(0xCA5A826395121157 * c, 2**64)
        a, b, c, d = other_high ^ b ^ k, other_low, high ^ d ^ m, low
        k, m = (k + 0x9E3779B97F4A7C15) & WORD, (m + 0xBB67AE8584CAA73B) & WORD
    return [a, b, c, d]


def words(seed: int, stream: int, position: int, blocks: int) -> list[int]:
    """All words of a position that owns `blocks` counters."""
    counters = range(position * blocks + 1, (position + 1) * blocks + 1)
    return [word for counter in counters for word in philox((counter, 0, 0, 0), (seed, stream))]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
        ((WORD,) * 4, (WORD,) * 2, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
        (
            (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
        ),
    ],
)
def test_numpys_words_are_the_published_ones(counter: tuple[int, ...], key: tuple[int, ...], expected: str) -> None:
    """numpy and the function above both give Random123's known answers."""
    before = (sum(part << 64 * place for place, part in enumerate(counter)) - 1) % 2**256
    raw = np.random.Philox(key=np.array(key, np.uint64), counter=before).random_raw(4).tolist()
    assert raw == philox(counter, key) == [int(word, 16) for word in expected.split()]


@pytest.mark.parametrize("seed", [0, 7, 7 + 2**32, 2**63 - 1])
def test_numbers_are_computed_from_the_words_of_their_position(seed: int) -> None:
    own = [words(seed, STEP, position, 2) for position in (1000, 1001)]
    assert raw_words(seed, STEP, 1000, 2, 7).tolist() == [row[:7] for row in own]
    halves = [[half >> 8 for word in row for half in (word >> 32, word & 0xFFFFFFFF)] for row in own]
    assert uniforms(seed, STEP, 1000, 2, 13).double().mul(2**24).tolist() == [row[:13] for row in halves]
    expected = []
    for row in own:
        for word in row:
            radius = math.sqrt(-2 * math.log(((word >> 32) + 0.5) / 2**32))
            angle = 2 * math.pi * (word & 0xFFFFFFFF) / 2**32
            expected += [radius * math.cos(angle), radius * math.sin(angle)]
    torch.testing.assert_close(normals(seed, STEP, 1000, 2, 16).flatten(), torch.tensor(expected), rtol=2e-7, atol=1e-9)


def test_a_seeds_initial_weights_never_change() -> None:
    assert [derive(0, WEIGHTS), derive(7 + 2**32, WEIGHTS), derive(0, WEIGHTS, 1)] == [
        7896617691693857887,
        3317731564112288844,
        4324601099084218337,
    ]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 3), (1, 1, 1), (3, 32, 32)])
def test_a_slice_is_that_slice_of_the_whole(shape: tuple[int, ...]) -> None:
    whole, images = draw_step(3, 5, 40, 100, shape, num_blocks=3), draw_images(3, 5, 40, 100)
    assert 3 * WORDS_AT_ONCE < 40 * 3 * 32 * 32 // 2, "some slices must be made in several pieces"
    for start, stop in [(0, 1), (0, 40), (1, 2), (1, 20), (3, 36), (7, 40), (13, 14), (20, 40), (39, 40), (5, 5)]:
        part, expected = draw_step(3, 5, 40, 100, shape, start, stop, 3), whole.slice(start, stop)
        for name, own in vars(part).items():
            assert np.array_equal(own, vars(expected)[name]), (name, start, stop)
        cut, kept = draw_images(3, 5, 40, 100, start, stop), images.slice(start, stop)
        assert np.array_equal(cut.indices, kept.indices) and torch.equal(cut.uniform, kept.uniform)


def test_images_and_noise_do_not_depend_on_the_batch_size() -> None:
    large = draw_step(3, 2, 20, 100, (1, 3, 3), num_blocks=3)
    small = [draw_step(3, step, 5, 100, (1, 3, 3), num_blocks=3) for step in range(8, 12)]
    for name in vars(large):
        assert np.array_equal(vars(large)[name], np.concatenate([vars(draws)[name] for draws in small]))


def test_every_epoch_is_a_permutation() -> None:
    order = image_order(0, 0, 300, 100)
    for epoch in range(3):
        keys = words(0, ORDER, epoch, 25)
        assert order[100 * epoch : 100 * (epoch + 1)].tolist() == sorted(range(100), key=keys.__getitem__)
    assert not np.array_equal(order[:100], order[100:200])
    assert np.array_equal(order, np.concatenate([image_order(0, k, 20, 100) for k in range(0, 300, 20)]))


def test_other_seeds_steps_and_streams_draw_other_numbers() -> None:
    every = [draw_step(seed, step, 8, 50, (3, 4, 4)) for seed in (7, 7 + 2**32, 8) for step in (0, 1, 2**40)]
    for name in ("indices", "noise", "uniform", "drop_label"):
        assert len({vars(draws)[name].tobytes() if name == "indices" else vars(draws)[name].numpy().tobytes()
                    for draws in every}) == len(every), name  # fmt: skip
    streams = {raw_words(7, stream, 0, 1, 4).tobytes() for stream in (ORDER, STEP, MODEL, AUGMENT, NOISE, DEPTH)}
    assert len(streams) == 6


def test_dropout_seeds_of_a_process_never_meet() -> None:
    assert [words(3, MODEL, process, 1)[0] % 2**32 for process in (0, 5)] == [dropout_seed(3, 0, p) for p in (0, 5)]
    seeds = [dropout_seed(3, step, 5) for step in (*range(2000), 2**32 - 1)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**32
    assert len({dropout_seed(seed, 9, process) for seed in (3, 3 + 2**32) for process in range(50)}) == 100


def test_draws_are_distributed_as_they_should_be() -> None:
    draws = draw_step(0, 0, 4000, 50_000, (3, 8, 8), num_blocks=5)
    noise = draws.noise.double().numpy().reshape(4000, -1)
    assert stats.kstest(noise.ravel(), "norm").pvalue > 0.01
    assert draws.depth is not None and draws.depth.shape == (4000, 5, 2)
    augmentation = draw_images(0, 0, 4000, 50_000).uniform.flatten()
    for numbers in (draws.uniform, draws.drop_label, draws.depth.flatten(), augmentation):
        assert numbers.min() >= 0 and numbers.max() < 1
        assert stats.kstest(numbers.double().numpy(), "uniform").pvalue > 0.01
    assert stats.binomtest(int(draws.flips.sum()), 4000).pvalue > 0.01
    count = noise.size
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((noise**power).mean() - moment) < 4 * math.sqrt(variance / count), power
    assert noise.max() > 4.3 and noise.min() < -4.3, "768,000 numbers reach into the tails"
    # Neighboring pixels, consecutive images and pairs of normals are uncorrelated, and so are their squares.
    for first, second in ((noise[:, :-1], noise[:, 1:]), (noise[:-1], noise[1:]), (noise[:, ::2], noise[:, 1::2])):
        for kind in (lambda x: x, np.square):
            assert stats.pearsonr(kind(first).ravel(), kind(second).ravel()).pvalue > 0.01
    correlations = np.corrcoef(np.stack([draws.uniform, draws.drop_label, draws.flips, noise[:, 0]]))
    assert np.abs(correlations - np.eye(4)).max() < 0.06
