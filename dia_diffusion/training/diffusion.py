"""Training a diffusion model: its images, loss, sample grids and pipeline folders."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from dia_diffusion.data import ImageSet
from dia_diffusion.data.sources import open_images_on_ranks
from dia_diffusion.distributed import on_rank_zero, sent
from dia_diffusion.errors import InputError, RunError
from dia_diffusion.io import atomic_dir, step_name, write_json
from dia_diffusion.models import factory
from dia_diffusion.models.factory import build_on_meta, check_layers, check_memory
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.pipelines.folder import TRAINING_FILE
from dia_diffusion.pipelines.pipeline_uvit import UViTPipeline
from dia_diffusion.progress import Progress
from dia_diffusion.sampling.generate import adapt_pipeline, generate
from dia_diffusion.sampling.load import Guide
from dia_diffusion.sampling.samplers import SamplingSettings
from dia_diffusion.sampling.writers import save_grid
from dia_diffusion.sharing.card import write_card
from dia_diffusion.training.callbacks import Callback, checkpoint_due, log_image
from dia_diffusion.training.config import Experiment, ModelConfig
from dia_diffusion.training.init_from import same_start, start_from
from dia_diffusion.training.muon import Muon, muon_groups
from dia_diffusion.training.optimizer import optimizer_at_batch_size, parameter_groups, reference_steps
from dia_diffusion.training.randomness import WEIGHTS, StepDraws, derive, draw_step
from dia_diffusion.training.recipe import resolve
from dia_diffusion.training.ssia import Guidance, without_heads
from dia_diffusion.training.task import Task

if TYPE_CHECKING:
    from dia_diffusion.training.trainer import StepResult, Trainer


MAX_LAYERS = 10_000


def image_losses(
    model: nn.Module, process: NoiseProcess, images: Tensor, draws: StepDraws, labels: Tensor | None
) -> Tensor:
    """The diffusion loss of each image (B,)."""
    timestep = process.timestep(draws.uniform)  # (B,)
    noisy, target = process.mix(images, sent(draws.noise.to(images.dtype), images.device), timestep)
    depth = {} if draws.depth is None else {"depth_draws": sent(draws.depth, images.device)}
    (prediction,) = model(noisy, sent(timestep, images.device), labels, return_dict=False, **depth)
    error = (prediction.to(images.dtype) - target).square().mean(dim=(1, 2, 3))  # (B,)
    return error * sent(process.loss_weight(timestep).to(error.dtype), error.device)


def dropping_blocks(config: ModelConfig) -> int:
    """The number of blocks that need draws for stochastic depth; 0 without it."""
    model = config.model_dump()
    return int(model["num_layers"]) if model["backbone"] == "uvit" and model.get("drop_path") else 0


def open_training_images(experiment: Experiment, accelerator: Accelerator, progress: Progress) -> ImageSet:
    """The recipe's images at its model's size, on each process.

    Raises:
        InputError: no such images, or they lack the classes that the model needs; raised on all processes if on one.
    """
    data, model = experiment.data, experiment.model
    options = {"size": model.sample_size, "channels": model.in_channels, "split": data.split}
    images = open_images_on_ranks(data.source, accelerator, progress, **options)
    if model.num_classes is None:
        return images
    if images.labels is None:
        raise InputError(
            f"`model.num_classes` must be null for data.source {data.source}, which has no classes, "
            f"got {model.num_classes}"
        )
    present = int(images.labels.max()) + 1
    if present > model.num_classes:
        raise InputError(
            f"`model.num_classes` must be {present} or more for data.source {data.source}, which has {present} "
            f"classes, got {model.num_classes}"
        )
    return images


def training_batch(
    images: ImageSet, experiment: Experiment, draws: StepDraws, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The images (B, C, H, W) in [-1, 1] that a step draws, and their labels (B,) if the model has classes."""
    pixels = sent(torch.from_numpy(images.read(draws.indices)), device)  # (B, C, H, W) uint8
    batch = pixels.to(dtype) / 127.5 - 1
    if experiment.data.random_flip:
        batch = torch.where(sent(draws.flips, device)[:, None, None, None], batch.flip(-1), batch)
    num_classes = experiment.model.num_classes
    if images.labels is None or num_classes is None:
        return batch, None
    dropped = draws.drop_label < experiment.data.label_dropout
    labels = torch.from_numpy(images.labels[draws.indices]).masked_fill(dropped, num_classes)
    return batch, sent(labels, device)


# For U-ViTs of 44 to 2 million parameters, compiling pays off after 80 to 4,000 steps (docs/results/speed.md).
UVIT_PAYS_AFTER = 5000


class DiffusionTask(Task):
    """A recipe's noise process, loss, sample grids and pipeline folders."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment = resolve(experiment)
        check_samples(experiment)
        self.description = f"attention {experiment.model.attention}"
        self.optimizer_config = optimizer_at_batch_size(experiment.optimizer, experiment.train)
        self.ema = experiment.ema
        self.reference_steps = reference_steps(experiment.train)
        self.compiling_pays_after = UVIT_PAYS_AFTER if experiment.model.backbone == "uvit" else None
        self.process = experiment.noise_process()
        self.dropping_blocks = dropping_blocks(experiment.model)
        self.images: ImageSet
        self.guidance: Guidance | None = None

    def build_model(self) -> nn.Module:
        model = build_model(self.experiment.model)
        if self.experiment.train.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if self.experiment.ssia.weight:
            seed = derive(self.experiment.seed, WEIGHTS, 1)  # number 0 is for the model
            self.guidance = Guidance(model, self.experiment.ssia.reduction, seed)
        return model

    def build_optimizer(self, model: Any) -> torch.optim.Optimizer:
        config = self.optimizer_config
        rate, betas, decay = config.learning_rate, (config.betas[0], config.betas[1]), config.weight_decay
        groups = parameter_groups(model, rate, config.unit_learning_rate)
        if config.name == "adamw":
            return torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=decay, fused=True)
        groups = muon_groups(model, groups, config.muon_learning_rate or rate)
        dtype = torch.bfloat16 if self.experiment.train.mixed_precision == "bf16" else None
        return Muon(groups, rate, betas, decay, config.muon_momentum, dtype)

    def init_weights(self, model: Any) -> dict[str, Any] | None:
        source = self.experiment.init_from
        return None if source is None else start_from(source, model, self.experiment)

    def check_start(self, kept: dict[str, Any] | None) -> dict[str, Any] | None:
        return same_start(kept, self.experiment.init_from)

    def open_images(self, accelerator: Accelerator, progress: Progress) -> ImageSet:
        self.images = open_training_images(self.experiment, accelerator, progress)
        return self.images

    def draw(self, step: int, start: int, stop: int) -> StepDraws:
        seed, batch_size, shape = self.experiment.seed, self.experiment.train.batch_size, self.images.shape
        return draw_step(seed, step, batch_size, len(self.images), shape, start, stop, self.dropping_blocks)

    def loss(self, network: nn.Module, draws: StepDraws, device: torch.device, dtype: torch.dtype) -> Tensor:
        images, labels = training_batch(self.images, self.experiment, draws, device, dtype)
        loss = image_losses(network, self.process, images, draws, labels).mean()
        return loss if self.guidance is None else loss + self.experiment.ssia.weight * self.guidance.take()

    def callbacks(self) -> list[Callback]:
        return [SaveSamples(self.experiment)]


class SaveSamples(Callback):
    """Draws the sample grids, and saves the averaged weights as a pipeline folder with each checkpoint."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.config = experiment, experiment.train

    def due(self, step: int) -> bool:
        return self._grid_due(step) or checkpoint_due(self.config, step)

    def _grid_due(self, step: int) -> bool:
        every = self.config.sample_every
        return every > 0 and (step % every == 0 or checkpoint_due(self.config, step))

    def __call__(self, trainer: "Trainer", result: "StepResult") -> None:
        trainer.check_finite()
        on_rank_zero(trainer.accelerator, lambda: self._save(trainer))

    def _save(self, trainer: "Trainer") -> None:
        step, weights = trainer.step, trainer.averaged_weights()
        assert weights is not None
        grid = trainer.folder.samples / f"{step_name(step)}.png"
        pipeline = build_pipeline(self.experiment, without_heads(weights), trainer.accelerator.device)
        if self._grid_due(step):
            try:
                save_samples(pipeline, self.experiment, grid)
            except (InputError, RunError) as error:  # such as out of memory; training doesn't need the grid
                trainer.message(f"step {step:,}: no grid, {error}")
            else:
                log_image(trainer, "samples", np.asarray(Image.open(grid).convert("RGB")))
        if checkpoint_due(self.config, step):
            save_pipeline(pipeline, trainer.folder.pipelines / step_name(step), trainer.origin(), grid)


def build_model(config: ModelConfig) -> Any:
    """The recipe's backbone and unit, with initial weights from torch's default generator."""
    return factory.build_model(config.model_dump())


def build_pipeline(experiment: Experiment, weights: dict[str, Tensor], device: torch.device) -> UViTPipeline:
    """A pipeline of the recipe's model with these weights."""
    model = build_model(experiment.model).eval().requires_grad_(False)
    model.load_state_dict(weights)
    pipeline = _pipeline(model, experiment.noise_process())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _pipeline(model: nn.Module, process: NoiseProcess) -> UViTPipeline:
    scheduler = process.build_scheduler()
    prediction_type = None if "prediction_type" in scheduler.config else process.prediction_type
    return UViTPipeline(model, scheduler, prediction_type)


def check_samples(experiment: Experiment, settings: SamplingSettings | None = None, guide: Guide | None = None) -> None:
    """Raises InputError if the recipe's model can't be sampled, by default for its grids, or is too large.

    settings, guide: replace those of the grids, which have no guide.
    """
    check_layers(experiment.model.model_dump(), MAX_LAYERS)
    model = build_on_meta(lambda: build_model(experiment.model))
    check_memory(model)
    pipeline, settings = _pipeline(model, experiment.noise_process()), settings or sampling_settings(experiment)
    adapt_pipeline(pipeline, settings, guide)
    if guide is None and settings.guidance_scale != 1 and not experiment.data.label_dropout:
        raise InputError(f"`guidance_scale` must be 1 without data.label_dropout, got {settings.guidance_scale}")


def save_samples(pipeline: UViTPipeline, experiment: Experiment, path: Path) -> None:
    """Writes a grid of the images of seeds 0..count - 1; for class-conditional models, each column shows one class."""
    adapted, seeds = adapt_pipeline(pipeline, sampling_settings(experiment)), range(experiment.samples.count)
    images = torch.cat([images for _, images in generate(adapted, seeds)])
    save_grid(images, path, adapted.settings.grid_columns(seeds))


def sampling_settings(experiment: Experiment) -> SamplingSettings:
    samples = experiment.samples
    return SamplingSettings(
        samples.sampler,
        samples.steps,
        guidance_scale=samples.guidance_scale,
        guidance_interval=samples.guidance_interval,
    )


def save_pipeline(pipeline: UViTPipeline, place: Path, training: dict[str, Any], grid: Path | None) -> None:
    """Writes the pipeline folder with a record of its training and a model card."""
    with atomic_dir(place) as temporary:
        pipeline.save_pretrained(temporary)
        write_json(temporary / TRAINING_FILE, training)
        if grid is not None and grid.is_file():
            (temporary / "samples.png").write_bytes(grid.read_bytes())
        write_card(temporary)
