"""A sampler and a noise process from outside the library in training, saving, loading and sampling."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from dia_diffusion import UViTPipeline
from dia_diffusion.data import open_images
from dia_diffusion.errors import InputError
from dia_diffusion.noise import PROCESSES, NoiseProcess, Process
from dia_diffusion.predictions import PREDICTION_TYPES, PredictionType
from dia_diffusion.sampling.generate import adapt_pipeline, generate
from dia_diffusion.sampling.load import load_pipeline
from dia_diffusion.sampling.samplers import OWN_SAMPLER, SAMPLERS, Sampler, SamplingSettings, build_scheduler
from dia_diffusion.times import TIMES
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.trainer import Trainer
from tests.training.conftest import Recorder


class StraightScheduler(SchedulerMixin, ConfigMixin):
    """Euler steps along a velocity, from t = 1 to 0; the network receives 1000 t."""

    order = 1

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000):
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        self.timesteps = torch.linspace(1000, 0, num_inference_steps + 1, device=device)[:-1]

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> SchedulerOutput:
        return SchedulerOutput(prev_sample=sample - model_output / len(self.timesteps))


class StraightPaths(Process):
    """x_t = (1 - t) x_0 + t noise."""

    prediction_types = ("slope",)
    scheduler_class = StraightScheduler

    def network_time(self, t: Tensor) -> Tensor:
        return 1000 * t

    def alpha_sigma(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        t = timestep.cpu().double() / 1000
        return 1 - t, t


SLOPE = PredictionType(
    target=lambda image, noise, alpha, sigma: noise - image,
    noise=lambda prediction, sample, alpha, sigma: (sample + alpha * prediction) / (alpha + sigma),
    error_scale=lambda snr: (snr.sqrt() + 1) ** 2,
)


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the test's registrations after it."""
    for registry in (PROCESSES, PREDICTION_TYPES, SAMPLERS, TIMES):
        monkeypatch.setattr(registry, "_rows", dict(registry))


@pytest.fixture
def straight(registries: None) -> None:
    PREDICTION_TYPES.register("slope", SLOPE)
    PROCESSES.register("straight", StraightPaths())


TINY = [
    *("--train.mixed_precision", "none", "--train.compile", "false"),
    *("--train.max_steps", "40", "--train.batch_size", "32", "--train.checkpoint_every", "40"),
    *("--train.sample_every", "40", "--samples.count", "4", "--samples.steps", "4", "--train.log_every", "2"),
    *("--model.hidden_size", "32", "--model.num_layers", "3", "--model.num_attention_heads", "2"),
    *("--optimizer.warmup_steps", "0", "--optimizer.learning_rate", "2e-3", "--ema.warmup", "true"),
]
FLOW = ["--noise.schedule", "straight", "--noise.prediction_type", "slope", "--samples.sampler", OWN_SAMPLER]


def train(run: Path, *options: str) -> list[float]:
    """Trains a tiny UViT on digits; returns the logged losses."""
    Trainer(read_experiment("digits_uvit_cpu", [*TINY, *options, "--output", str(run)]), Recorder()).run()
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def drawn(pipeline: UViTPipeline, sampler: str, seeds: list[int], batch_size: int = 64) -> Tensor:
    """uint8 images (B, C, H, W)."""
    adapted = adapt_pipeline(pipeline, SamplingSettings(sampler, 4))
    return torch.cat([images for _, images in generate(adapted, seeds, batch_size)])


def test_a_noise_process_of_ones_own_is_trained_saved_loaded_and_sampled(straight: None, tmp_path: Path) -> None:
    steps = ["--train.max_steps", "150", "--train.checkpoint_every", "150", "--train.sample_every", "150"]
    losses = train(tmp_path / "run", *FLOW, *steps)
    images = torch.from_numpy(open_images("digits", size=8, channels=1).read(range(1201))) / 127.5 - 1
    # The loss of the best constant prediction of noise - image; only a network that uses x_t can get below it.
    assert sum(losses[-5:]) / 5 < 1 + images.var(dim=0).mean()
    (grid,) = (tmp_path / "run" / "samples").glob("*.png")
    assert grid.stat().st_size > 0
    pipeline = load_pipeline(tmp_path / "run")
    assert type(pipeline.scheduler) is StraightScheduler
    images = drawn(pipeline, OWN_SAMPLER, [0, 1, 2])
    assert images.float().std() > 5
    assert (images[1:2].int() - drawn(pipeline, OWN_SAMPLER, [1]).int()).abs().max() <= 1
    with pytest.raises(InputError, match=r"`sampler` must be one of own for the process of a StraightScheduler"):
        drawn(pipeline, "dpmsolver++", [0])


def test_a_new_run_starts_only_from_weights_of_the_same_process(straight: None, tmp_path: Path) -> None:
    train(tmp_path / "first", *FLOW, "--train.max_steps", "2", "--train.checkpoint_every", "2")
    start = ["--init_from", str(tmp_path / "first"), "--train.max_steps", "2"]
    train(tmp_path / "second", *FLOW, *start)
    with pytest.raises(InputError, match="init_from"):
        train(tmp_path / "third", *start)


def test_min_snr_weights_the_errors_of_the_image(straight: None) -> None:
    """A velocity error e is an image error t e: x_0 = x_t - t velocity."""
    process = NoiseProcess("straight", "slope", "min-snr")
    t = torch.tensor([0.05, 0.5, 0.9])
    expected = ((1 - t) / t).square().clamp(max=5) * t.square()
    torch.testing.assert_close(process.loss_weight(process.timestep(t)), expected)


def test_times_of_ones_own(registries: None) -> None:
    TIMES.register("late", lambda uniform, power=2: uniform ** (1 / power))
    uniform = torch.tensor([0.0, 0.25])
    assert NoiseProcess("vp-continuous", times="late").timestep(uniform).tolist() == [0, 999 / 2]
    assert NoiseProcess("vp-continuous", times="late", times_kwargs={"power": 1}).timestep(uniform)[1] == 999 / 4


def test_a_sampler_of_ones_own(registries: None) -> None:
    with pytest.raises(InputError, match="got 'plain-ddim'"):
        SAMPLERS.choose("plain-ddim", "sampler")
    SAMPLERS.register("plain-ddim", Sampler(DDIMScheduler, {"timestep_spacing": "trailing", "clip_sample": False}))
    SAMPLERS.register("straight", Sampler(StraightScheduler, process_settings=(), follows=lambda scheduler: True))
    theirs = NoiseProcess("cosine").build_scheduler()
    ours = build_scheduler("plain-ddim", theirs)
    assert type(ours) is DDIMScheduler and ours.config.trained_betas == theirs.config.trained_betas
    assert type(build_scheduler("straight", theirs)) is StraightScheduler


def test_a_scheduler_of_ones_own_is_saved_and_loaded(registries: None, tmp_path: Path) -> None:
    train(tmp_path / "run", "--train.max_steps", "2", "--train.checkpoint_every", "2")
    SAMPLERS.register("straight", Sampler(StraightScheduler, process_settings=(), follows=lambda scheduler: True))
    pipeline = load_pipeline(tmp_path / "run")
    images = drawn(pipeline, "straight", [0, 1])
    pipeline.scheduler = build_scheduler("straight", pipeline.scheduler)
    pipeline.save_pretrained(tmp_path / "saved")
    assert torch.equal(drawn(load_pipeline(tmp_path / "saved"), OWN_SAMPLER, [0, 1]), images)
