"""Randomness depends on (seed, step, image) alone."""

import numpy as np
import torch

from dia_diffusion.training.randomness import draw_step, image_order


def test_every_epoch_is_a_permutation() -> None:
    order = image_order(0, 0, 300, 100)
    for epoch in range(3):
        assert sorted(order[100 * epoch : 100 * (epoch + 1)]) == list(range(100))
    assert not np.array_equal(order[:100], order[100:200])


def test_order_does_not_depend_on_where_it_is_cut() -> None:
    whole = image_order(3, 0, 250, 100)
    assert np.array_equal(whole, np.concatenate([image_order(3, k, 10, 100) for k in range(0, 250, 10)]))
    # Runs of other batch sizes see the same images in the same order.
    small = [draw_step(3, step, 5, 100, (1, 2, 2)).indices for step in range(50)]
    assert np.array_equal(whole, np.concatenate(small))


def test_a_step_can_be_drawn_again_and_sliced() -> None:
    first = draw_step(1, 7, 8, 100, (3, 4, 4))
    draw_step(1, 8, 8, 100, (3, 4, 4))
    again = draw_step(1, 7, 8, 100, (3, 4, 4))
    assert torch.equal(first.noise, again.noise) and torch.equal(first.uniform, again.uniform)
    part = again.slice(2, 5)
    assert torch.equal(part.noise, first.noise[2:5]) and np.array_equal(part.indices, first.indices[2:5])
    for other in (draw_step(2, 7, 8, 100, (3, 4, 4)), draw_step(1, 6, 8, 100, (3, 4, 4))):
        assert not torch.equal(other.noise, first.noise) and not torch.equal(other.uniform, first.uniform)


def test_draws_are_distributed_as_they_should_be() -> None:
    draws = draw_step(0, 0, 20_000, 50_000, (1, 2, 2))
    assert abs(float(draws.flips.float().mean()) - 0.5) < 0.02
    assert abs(float(draws.uniform.mean()) - 0.5) < 0.01
    assert abs(float(draws.noise.mean())) < 0.02 and abs(float(draws.noise.std()) - 1) < 0.02
