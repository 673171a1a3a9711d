"""Estimated times: a measured step agrees with the trainer's own log, and the planned settings are timed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.pipelines.pipeline_uvit import UViTPipeline
from dia_diffusion.sweeps.plan import seconds_of_sampler_step, seconds_of_step
from dia_diffusion.training import trainer
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.run_folder import read_metrics
from dia_diffusion.training.trainer import StepResult, Trainer


def test_the_measured_step_agrees_with_a_runs_log(
    tiny: Callable[..., Experiment], train: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured with a clock that advances only during steps."""
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


def test_the_run_that_is_timed_is_compiled_like_the_planned_one(
    tiny: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, int]] = []

    def compiled(model: torch.nn.Module, setting: Any, max_steps: int, *_: Any, **__: Any) -> torch.nn.Module:
        asked.append((setting, max_steps))
        return model

    monkeypatch.setattr(trainer, "compiled", compiled)
    options = ("--train.max_steps", "6000", "--train.compile", "auto")
    seconds_of_step(tiny("run", *options, "--model.num_classes", "10", "--data.label_dropout", "0.1"))
    assert asked == [("auto", 6000)]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_images_are_drawn_as_the_settings_say(
    guidance: float, tiny: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    draw = UViTPipeline.__call__

    def call(self: UViTPipeline, **options: Any) -> Any:
        calls.append(options | {"dtype": self.unet.dtype})
        return draw(self, **options)

    monkeypatch.setattr(UViTPipeline, "__call__", call)
    experiment = tiny("run", "--model.num_classes", "10", "--data.label_dropout", "0.1")
    asked = {"features": "digits", "num_samples": 70, "sampler": "euler-maruyama", "steps": 50, "classes": [3]}
    protocol = EvalProtocol.model_validate({**asked, "guidance_scale": guidance, "precision": "bfloat16"})
    seconds_of_sampler_step(experiment, protocol)
    for options in calls:
        assert (options["dtype"], options["guidance_scale"]) == (torch.bfloat16, guidance)
        assert options["num_inference_steps"] == 8 and set(options["class_labels"]) == {3}
