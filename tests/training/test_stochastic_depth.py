"""Stochastic depth in training: what is dropped depends on seed, step and image alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dia_diffusion.errors import InputError
from dia_diffusion.training.diffusion import DiffusionTask
from dia_diffusion.training.randomness import draw_step
from dia_diffusion.training.recipe import read_experiment
from tests.training.run_files import assert_same_run, metrics, weights

DROP = ("--model.drop_path", "0.5")


def test_micro_batches_drop_the_same(in_float64, tiny, train, tmp_path: Path) -> None:
    for name, options in {"whole": DROP, "parts": (*DROP, "--train.accumulation", "2"), "without": ()}.items():
        train(tiny(name, *options))
    whole, parts, without = (
        [line["loss"] for line in metrics(tmp_path / name)] for name in ("whole", "parts", "without")
    )
    assert parts == pytest.approx(whole, rel=1e-9) and without != pytest.approx(whole, rel=1e-5)
    expected, split = weights(tmp_path / "whole", 6), weights(tmp_path / "parts", 6)
    assert max(float((expected[key] - split[key]).abs().max()) for key in expected) < 1e-9


def test_resumed_and_checkpointed_runs_are_the_same(tiny, train, tmp_path: Path) -> None:
    train(tiny("whole", *DROP))
    train(tiny("resumed", *DROP, "--train.max_steps", "3"))
    train(tiny("resumed", *DROP))
    train(tiny("checkpointed", *DROP, "--train.gradient_checkpointing", "true"))
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    assert_same_run(tmp_path / "whole", tmp_path / "checkpointed")


def test_only_networks_that_drop_draw_for_it(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, expected in (((), None), (DROP, (3, 3, 2))):
        task = DiffusionTask(tiny("run", *options))
        task.images = type("Images", (), {"shape": (1, 8, 8), "__len__": lambda self: 100})()
        draws, plain = task.draw(2, 1, 4), draw_step(0, 2, 8, 100, (1, 8, 8), 1, 4)
        assert torch.equal(draws.noise, plain.noise) and torch.equal(draws.uniform, plain.uniform)
        assert (None if draws.depth is None else draws.depth.shape) == expected


def test_a_run_may_start_from_weights_with_another_rate(tiny, train, tmp_path: Path) -> None:
    train(tiny("source", "--train.max_steps", "3"))
    train(tiny("run", *DROP, "--init_from", str(tmp_path / "source"), "--train.max_steps", "1"))


def test_other_backbones_have_no_such_key() -> None:
    with pytest.raises(InputError, match=r"`model\.drop_path` must be left out for backbone dit, got 0\.5"):
        read_experiment("digits_dit_cpu", DROP)
