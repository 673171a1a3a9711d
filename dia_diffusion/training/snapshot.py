"""What a run shows of itself along the way: a pipeline folder of the averaged weights, a grid of its samples."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from dia_diffusion.io import atomic_dir, write_json
from dia_diffusion.models import factory
from dia_diffusion.models.factory import build_on_meta, check_layers, check_memory
from dia_diffusion.pipelines.card import TRAINING_FILE, write_card
from dia_diffusion.pipelines.pipeline_uvit import UViTPipeline
from dia_diffusion.sampling.image_pipeline import adapt_pipeline
from dia_diffusion.sampling.samplers import DEFAULT_SAMPLER, build_scheduler
from dia_diffusion.sampling.settings import SamplingSettings
from dia_diffusion.sampling.writers import save_grid
from dia_diffusion.training.config import Experiment, ModelConfig

MOST_LAYERS = 10_000


def build_model(config: ModelConfig) -> Any:
    """The recipe's backbone and unit, with first weights from torch's default generator."""
    return factory.build_model(config.model_dump())


def build_scheduler_of(experiment: Experiment) -> SchedulerMixin:
    """The scheduler that the recipe's pipelines have: its noise process, with the default sampler's settings."""
    return build_scheduler(DEFAULT_SAMPLER, DDPMScheduler(**experiment.noise_process().scheduler_config()))


def build_pipeline(experiment: Experiment, weights: dict[str, Tensor], device: torch.device) -> UViTPipeline:
    """A pipeline of the recipe's model with these weights."""
    model = build_model(experiment.model).eval().requires_grad_(False)
    model.load_state_dict(weights)
    pipeline = UViTPipeline(model, build_scheduler_of(experiment))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def check_samples(experiment: Experiment) -> None:
    """Raises InputError where the recipe's grids couldn't be drawn, hours before the first is due."""
    check_layers(experiment.model.model_dump(), MOST_LAYERS)
    model = build_on_meta(lambda: build_model(experiment.model))
    check_memory(model)
    _settings(experiment).use(adapt_pipeline(UViTPipeline(model, build_scheduler_of(experiment))))


def save_samples(pipeline: UViTPipeline, experiment: Experiment, path: Path) -> None:
    """A grid of the images of the seeds 0..count - 1; of class-conditional models each column shows a class."""
    adapted = adapt_pipeline(pipeline)
    settings, seeds = _settings(experiment).use(adapted), range(experiment.samples.count)
    batches = settings.generate(adapted, seeds, batch_size=64)
    save_grid(torch.cat([images for _, images in batches]), path, settings.grid_columns(seeds))


def _settings(experiment: Experiment) -> SamplingSettings:
    samples = experiment.samples
    return SamplingSettings(samples.sampler, samples.steps, guidance_scale=samples.guidance_scale)


def save_pipeline(pipeline: UViTPipeline, place: Path, training: dict[str, Any], grid: Path | None) -> None:
    """Writes the pipeline folder with where it comes from and a model card."""
    with atomic_dir(place) as temporary:
        pipeline.save_pretrained(temporary)
        write_json(temporary / TRAINING_FILE, training)
        if grid is not None and grid.is_file():
            (temporary / "samples.png").write_bytes(grid.read_bytes())
        write_card(temporary)
