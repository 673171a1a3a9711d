"""Half-lives in images: moments, average and warm-up at two batch sizes, against closed forms of the images seen."""

from pathlib import Path

import pytest
import torch

from dia_diffusion.errors import InputError
from dia_diffusion.training.config import EmaConfig, Experiment, ModelConfig, OptimizerConfig, TrainConfig
from dia_diffusion.training.diffusion import DiffusionTask
from dia_diffusion.training.optimizer import EMA, learning_rate
from dia_diffusion.training.trainer import Trainer
from tests.training.conftest import Recorder
from tests.training.run_files import weights

KEPT = torch.tensor(False)  # the skip that a finite step has


def task(batch_size: int, reference: int | None = 32, **optimizer: object) -> DiffusionTask:
    config = OptimizerConfig(betas=(0.9, 0.99), warmup_steps=200, learning_rate=1e-3, **optimizer)
    train = TrainConfig(batch_size=batch_size, reference_batch_size=reference)
    return DiffusionTask(Experiment(model=ModelConfig(attention="none"), train=train, optimizer=config))


@pytest.mark.parametrize("batch_size", [1, 4, 32, 64, 192])
@pytest.mark.parametrize("beta1_in_images", [False, True])
def test_adams_moments_decay_by_the_images_seen(batch_size: int, beta1_in_images: bool) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    model = torch.nn.ParameterList([parameter])
    optimizer = task(batch_size, beta1_in_images=beta1_in_images).build_optimizer(model)
    moments = {"step": torch.tensor(0.0), "exp_avg": torch.ones(1), "exp_avg_sq": torch.ones(1)}
    optimizer.state[parameter].update(moments)
    steps = 192 // batch_size
    for _ in range(steps):
        parameter.grad = torch.zeros(1)
        optimizer.step()
    state = optimizer.state[parameter]
    assert state["exp_avg_sq"].item() == pytest.approx(0.99**6, rel=1e-5)  # 192 images are 6 steps of 32
    assert state["exp_avg"].item() == pytest.approx(0.9**6 if beta1_in_images else 0.9**steps, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 32, 64])
def test_the_average_decays_by_the_images_seen(batch_size: int) -> None:
    average = EMA([torch.ones(1)], EmaConfig(decay=0.9), task(batch_size).reference_steps)
    for _ in range(192 // batch_size):
        average.update([torch.zeros(1)], KEPT)
    assert average.parameters[0].item() == pytest.approx(0.9**6, rel=1e-5)


@pytest.mark.parametrize("batch_size", [4, 32, 64])
def test_the_averages_warm_up_counts_images(batch_size: int) -> None:
    average = EMA([torch.ones(1)], EmaConfig(decay=0.5, warmup=True), task(batch_size).reference_steps)
    expected = 1.0
    for images in range(batch_size, 641, batch_size):
        average.update([torch.zeros(1)], KEPT)
        of_32 = min(0.5, (1 + images / 32) / (10 + images / 32))  # what a step of 32 images would keep by now
        expected *= of_32 ** (batch_size / 32)
        assert average.parameters[0].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [4, 32, 64])
def test_the_rate_warms_up_over_as_many_images(batch_size: int) -> None:
    config = task(batch_size).optimizer_config
    rates = [learning_rate(config, images // batch_size - 1, 500_000) for images in (64, 3200, 6400, 64000)]
    assert rates == pytest.approx([1e-5, 5e-4, 1e-3, 1e-3])


def test_without_a_reference_nothing_changes() -> None:
    for plain in (task(4, reference=None), task(32, reference=32)):
        assert plain.optimizer_config == plain.experiment.optimizer
        assert plain.reference_steps == 1


def test_a_run_at_its_reference_is_the_run_without_one_and_keeps_the_key(tiny, train, tmp_path: Path) -> None:
    train(tiny("plain", "--ema.warmup", "true"))
    train(tiny("same", "--ema.warmup", "true", "--train.reference_batch_size", "8"))
    for name in ("model", "ema", "optimizer"):
        plain, same = weights(tmp_path / "plain", 6, name), weights(tmp_path / "same", 6, name)
        assert all(torch.equal(plain[key], same[key]) for key in plain)
    with pytest.raises(InputError, match=r"train\.reference_batch_size: None -> 8"):
        Trainer(tiny("plain", "--ema.warmup", "true", "--train.reference_batch_size", "8"), Recorder())


def test_the_trainer_uses_them(tiny) -> None:
    trainer = Trainer(tiny("run", "--train.batch_size", "4", "--train.reference_batch_size", "16"), Recorder())
    (group,) = trainer.optimizer.param_groups
    assert group["betas"] == pytest.approx((0.99, 0.999**0.25))
    assert trainer.ema is not None and trainer.ema.reference_steps == 0.25
    trainer.run()
