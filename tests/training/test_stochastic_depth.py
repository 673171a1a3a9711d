"""Stochastic depth in training: what is dropped depends on seed, step and image alone."""

from collections.abc import Callable

import pytest
import torch

from dia_diffusion.errors import InputError
from dia_diffusion.training.diffusion import DiffusionTask
from dia_diffusion.training.randomness import draw_step
from dia_diffusion.training.recipe import read_experiment

DROP = ("--model.drop_path", "0.5")


def test_only_networks_that_drop_draw_for_it(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, expected in (((), None), (DROP, (3, 3, 2))):
        task = DiffusionTask(tiny("run", *options))
        task.images = type("Images", (), {"shape": (1, 8, 8), "__len__": lambda self: 100})()
        draws, plain = task.draw(2, 1, 4), draw_step(0, 2, 8, 100, (1, 8, 8), 1, 4)
        assert torch.equal(draws.noise, plain.noise) and torch.equal(draws.uniform, plain.uniform)
        assert (None if draws.depth is None else draws.depth.shape) == expected


def test_other_backbones_have_no_such_key() -> None:
    with pytest.raises(InputError, match=r"`model\.drop_path` must be left out for backbone dit, got 0\.5"):
        read_experiment("digits_dit_cpu", DROP)
