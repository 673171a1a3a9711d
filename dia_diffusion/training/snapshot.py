"""What a run shows of itself along the way: a pipeline folder of the averaged weights, a grid of its samples."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from dia_diffusion.files import whole_folder, write_json
from dia_diffusion.models.uvit import UViT
from dia_diffusion.pipelines.card import TRAINING_FILE, write_card
from dia_diffusion.pipelines.pipeline_uvit import UViTPipeline
from dia_diffusion.sampling.generate import generate
from dia_diffusion.sampling.samplers import DEFAULT_SAMPLER, build_scheduler
from dia_diffusion.sampling.writers import save_grid
from dia_diffusion.training.config import Experiment, ModelConfig


def build_model(config: ModelConfig) -> UViT:
    """The recipe's backbone and unit, with first weights from torch's default generator."""
    return UViT(**asdict(config))


def build_pipeline(experiment: Experiment, weights: dict[str, Tensor], device: torch.device) -> UViTPipeline:
    """A pipeline of the recipe's model with these weights."""
    model = build_model(experiment.model).eval().requires_grad_(False)
    model.load_state_dict(weights)
    process = DDPMScheduler(**experiment.noise_process().scheduler_config())
    pipeline = UViTPipeline(model, build_scheduler(DEFAULT_SAMPLER, process))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def save_samples(pipeline: UViTPipeline, experiment: Experiment, path: Path) -> None:
    """A grid of the images of the seeds 0..count - 1; class-conditional models show their classes in turn."""
    samples = experiment.samples
    seeds = list(range(samples.count))
    num_classes = experiment.model.num_classes
    labels = None if num_classes is None else [seed % num_classes for seed in seeds]
    scheduler = pipeline.scheduler
    pipeline.scheduler = build_scheduler(samples.sampler, scheduler)
    batches = generate(pipeline, seeds, batch_size=64, num_inference_steps=samples.steps, class_labels=labels)
    save_grid(torch.cat([images for _, images in batches]), path)
    pipeline.scheduler = scheduler


def save_pipeline(pipeline: UViTPipeline, place: Path, training: dict[str, Any], grid: Path | None) -> None:
    """Writes the pipeline folder with where it comes from and a model card."""
    with whole_folder(place) as temporary:
        pipeline.save_pretrained(temporary)
        write_json(temporary / TRAINING_FILE, training)
        if grid is not None and grid.is_file():
            (temporary / "samples.png").write_bytes(grid.read_bytes())
        write_card(temporary)
