"""Estimates: the schedule against brute force, and a measured step against the trainer's own log."""

from collections.abc import Callable

import pytest
import torch

from dia_diffusion.sweeps.plan import seconds_of_pass, seconds_of_step, threads, wall_seconds
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.run_folder import read_metrics
from dia_diffusion.training.trainer import StepResult, Trainer


@pytest.mark.parametrize("side_by_side", [1, 2, 3])
def test_wall_time_is_that_of_a_queue(side_by_side: int) -> None:
    jobs = [5, 1, 4, 2, 7, 3]
    waiting, running, clock = list(jobs), [], 0
    while waiting or running:  # second by second
        while waiting and len(running) < side_by_side:
            running.append(waiting.pop(0))
        clock += 1
        running = [left - 1 for left in running if left > 1]
    assert wall_seconds(jobs, side_by_side) == clock


def test_a_step_takes_what_the_log_of_a_run_says(
    tiny: Callable[..., Experiment], train: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only steps move."""
    now, train_step = [0.0], Trainer.train_step

    def in_half_a_second(self: Trainer) -> StepResult:
        now[0] += 0.5
        return train_step(self)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(Trainer, "train_step", in_half_a_second)
    experiment = tiny("run")
    assert seconds_of_step(experiment) == pytest.approx(0.5)
    rates = [line["images_per_second"] for line in read_metrics(train(experiment).folder.metrics)]
    assert rates == [8 / 0.5] * 6


def test_classes_and_precision_are_measured_too(tiny: Callable[..., Experiment]) -> None:
    experiment = tiny("run", "--model.num_classes", "10", "--data.label_dropout", "0.1")
    assert seconds_of_step(experiment) > 0
    assert seconds_of_pass(experiment, "bfloat16", "euler-maruyama") > 0


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
