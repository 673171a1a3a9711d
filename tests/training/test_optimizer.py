"""Learning rates compared with torch's; half-lives and warm-up in images, compared with closed forms."""

from pathlib import Path

import pytest
import torch

from dia_diffusion.errors import InputError
from dia_diffusion.training.config import (
    ClassifyOptimizerConfig,
    EmaConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from dia_diffusion.training.diffusion import DiffusionTask
from dia_diffusion.training.ema import EMA
from dia_diffusion.training.optimizer import learning_rate
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.trainer import Trainer
from tests.training.run_files import assert_same_tensors

KEPT = torch.tensor(False)  # a finite step is not skipped


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
        of_32 = min(0.5, (1 + images / 32) / (10 + images / 32))  # decay of a step of 32 images at this point
        expected *= of_32 ** (batch_size / 32)
        assert average.parameters[0].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [4, 32, 64])
def test_the_rate_warms_up_over_the_same_number_of_images(batch_size: int) -> None:
    config = task(batch_size).optimizer_config
    rates = [learning_rate(config, images // batch_size - 1, 500_000) for images in (64, 3200, 6400, 64000)]
    assert rates == pytest.approx([1e-5, 5e-4, 1e-3, 1e-3])


@pytest.mark.parametrize("batch_size", [4, 32, 64])
@pytest.mark.parametrize("beta1_in_images", [False, True])
def test_muons_momentum_decays_as_the_first_beta(batch_size: int, beta1_in_images: bool) -> None:
    config = task(batch_size, beta1_in_images=beta1_in_images).optimizer_config
    exponent = batch_size / 32 if beta1_in_images else 1
    assert (config.betas[0], config.muon_momentum) == pytest.approx((0.9**exponent, 0.95**exponent))


def test_a_run_at_its_reference_is_the_run_without_one(tiny, train, finished, tmp_path: Path) -> None:
    train(tiny("same", "--ema.warmup", "true", "--train.reference_batch_size", "8"))
    assert_same_tensors(finished("plain", "--ema.warmup", "true"), tmp_path / "same")


def test_the_trainer_uses_scaled_half_lives(tiny) -> None:
    trainer = Trainer(tiny("run", "--train.batch_size", "4", "--train.reference_batch_size", "16"))
    (group,) = trainer.optimizer.param_groups
    assert group["betas"] == pytest.approx((0.99, 0.999**0.25))
    assert trainer.ema is not None and trainer.ema.reference_steps == 0.25


def test_learning_rates() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10)
    assert [learning_rate(config, step, 100) for step in (0, 4, 9, 10, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    config = config.model_copy(update={"schedule": "cosine"})
    assert learning_rate(config, 10, 110) == 1.0
    assert learning_rate(config, 60, 110) == pytest.approx(0.5)
    assert learning_rate(config, 110, 110) == pytest.approx(0.0)


def test_warmup_stable_decay() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule="warmup-stable-decay", decay_fraction=0.25)
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:76] == [1.0] * 66
    assert rates[75:] == pytest.approx([(100 - step) / 25 for step in range(75, 101)])


@pytest.mark.parametrize(("batch_size", "longest"), [(None, 48), (4, 6), (64, 96)])
def test_the_warm_up_ends_before_the_decay(batch_size: int | None, longest: int) -> None:
    """60 steps, of which the last 12 decay; warm-up steps have 32 images if that is the reference batch size."""
    keys = {"train.max_steps": 60, "optimizer.schedule": "warmup-stable-decay", "optimizer.decay_fraction": 0.2}
    if batch_size is not None:
        keys |= {"train.batch_size": batch_size, "train.reference_batch_size": 32}
    read_experiment(None, keys=keys | {"optimizer.warmup_steps": longest})
    with pytest.raises(InputError, match=f"`optimizer.warmup_steps` must be at most {longest}, .* got {longest + 1}"):
        read_experiment(None, keys=keys | {"optimizer.warmup_steps": longest + 1})
    keys = {"train.max_steps": 1000, "optimizer.decay_fraction": 0.9, "optimizer.warmup_steps": 100}
    read_experiment(None, keys=keys | {"optimizer.schedule": "warmup-stable-decay"})  # (1 - 0.9) * 1000 is 99.99...


def test_rates_are_those_of_torch() -> None:
    def rates(schedule: type, **options: object) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
        scheduler = schedule(optimizer, **options)
        found = []
        for _ in range(20):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    def own(**options: object) -> list[float]:
        config = ClassifyOptimizerConfig(**options)
        return [learning_rate(config, step, 20, 0.3) for step in range(20)]

    steps = rates(torch.optim.lr_scheduler.MultiStepLR, milestones=[5, 12], gamma=0.2)
    assert own(milestones=[5, 12], gamma=0.2) == pytest.approx(steps)
    assert own(schedule="cosine") == pytest.approx(rates(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=20))
    line = rates(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=20)
    assert own(schedule="linear") == pytest.approx(line)
    rising_and_falling = own(schedule="linear", warmup_steps=4)
    assert rising_and_falling[:5] == pytest.approx([0.075, 0.15, 0.225, 0.3, 0.3])
    assert rising_and_falling[-2:] == pytest.approx([0.3 * 2 / 16, 0.3 / 16])
    assert own(schedule="constant", warmup_steps=4)[:5] == pytest.approx([0.075, 0.15, 0.225, 0.3, 0.3])
