"""Training of a diffusion model: its images, loss, optimizer settings, sample grids and pipeline folders."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dia_diffusion.data import ImageSet
from dia_diffusion.data.sources import open_images_together
from dia_diffusion.distributed import on_rank_zero, sent
from dia_diffusion.errors import InputError, RunError
from dia_diffusion.io import step_name
from dia_diffusion.models.attached import AttachedModel
from dia_diffusion.models.uvit import UViT
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.training.config import Experiment, OptimizerConfig, TrainConfig
from dia_diffusion.training.init_from import same_start, start_from
from dia_diffusion.training.randomness import WEIGHTS, StepDraws, derive, draw_step
from dia_diffusion.training.run_folder import Reporter
from dia_diffusion.training.snapshot import build_model, build_pipeline, check_samples, save_pipeline, save_samples
from dia_diffusion.training.ssia import Guidance, without_heads
from dia_diffusion.training.task import Moment, Task


def diffusion_loss(
    model: nn.Module, process: NoiseProcess, images: Tensor, draws: StepDraws, labels: Tensor | None
) -> Tensor:
    """Weighted mean squared error over images (B, C, H, W) in [-1, 1]; float32 whatever the model computes in."""
    return image_losses(model, process, images, draws, labels).mean()


def image_losses(
    model: nn.Module, process: NoiseProcess, images: Tensor, draws: StepDraws, labels: Tensor | None
) -> Tensor:
    """Each image's part (B,) of the diffusion loss."""
    timestep = process.timestep(draws.uniform)  # (B,)
    noisy, target = process.mix(images, sent(draws.noise.to(images.dtype), images.device), timestep)
    (prediction,) = model(noisy, sent(timestep, images.device), labels, return_dict=False)
    error = (prediction.to(images.dtype) - target).square().mean(dim=(1, 2, 3))  # (B,)
    return error * sent(process.loss_weight(timestep).to(error.dtype), error.device)


def parameter_groups(model: UViT | AttachedModel, config: OptimizerConfig) -> list[dict[str, Any]]:
    """AdamW's groups, each with its "peak_rate": every parameter, or the unit's apart where it has a rate of its own.

    The unit is what either model registers last, so the groups together are in the order of model.parameters().

    Raises:
        InputError: a rate for a unit without parameters.
    """
    parameters = list(model.parameters())
    if config.unit_learning_rate is None:
        return [{"params": parameters, "peak_rate": config.learning_rate}]
    count = 0 if model.unit is None else len(list(model.unit.parameters()))
    if count == 0:
        raise InputError(
            f"optimizer.unit_learning_rate is {config.unit_learning_rate} and the unit {model.config.attention!r} has "
            "no parameters; accepted: null"
        )
    return [
        {"params": parameters[:-count], "peak_rate": config.learning_rate},
        {"params": parameters[-count:], "peak_rate": config.unit_learning_rate},
    ]


def reference_steps(config: TrainConfig) -> float:
    """The steps of the reference batch size that one step has the images of; 1 without a reference."""
    return 1.0 if config.reference_batch_size is None else config.batch_size / config.reference_batch_size


def optimizer_at_batch_size(config: OptimizerConfig, train: TrainConfig) -> OptimizerConfig:
    """The settings for steps of train.batch_size: half-lives and warm-up as long in images as at the reference.

    beta2' = beta2^(B'/B), at the same learning rate (arXiv 2507.07101); beta1 likewise where the recipe says so.
    """
    steps = reference_steps(train)
    beta1, beta2 = config.betas
    betas = (beta1**steps if config.beta1_in_images else beta1, beta2**steps)
    return config.model_copy(update={"betas": betas, "warmup_steps": round(config.warmup_steps / steps)})


def learning_rate(config: OptimizerConfig, step: int, max_steps: int, peak: float | None = None) -> float:
    """The rate of a step, counted from 0: linear warm-up to `peak`, then constant or half a cosine down to zero.

    peak: None is config.learning_rate.
    """
    peak = config.learning_rate if peak is None else peak
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def open_training_images(experiment: Experiment, accelerator: Accelerator, reporter: Reporter) -> ImageSet:
    """The recipe's images at its model's size, on each process.

    Raises:
        InputError: no such images, or without the classes that the model needs; on all processes if on one.
    """
    data, model = experiment.data, experiment.model
    options = {"size": model.sample_size, "channels": model.in_channels, "split": data.split}
    images = open_images_together(data.source, accelerator, reporter.reading, **options)
    if model.num_classes is None:
        return images
    if images.labels is None:
        raise InputError(f"data.source {data.source} has no classes, which model.num_classes needs")
    present = int(images.labels.max()) + 1
    if present > model.num_classes:
        raise InputError(
            f"data.source {data.source} has {present} classes and model.num_classes is {model.num_classes}; "
            f"accepted: {present} or more"
        )
    return images


def training_batch(
    images: ImageSet, experiment: Experiment, draws: StepDraws, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The images (B, C, H, W) in [-1, 1] that a step draws, and their labels (B,) where the model has classes."""
    pixels = sent(torch.from_numpy(images.images[draws.indices]), device)  # (B, C, H, W) uint8
    batch = pixels.to(dtype) / 127.5 - 1
    if experiment.data.random_flip:
        batch = torch.where(sent(draws.flips, device)[:, None, None, None], batch.flip(-1), batch)
    num_classes = experiment.model.num_classes
    if images.labels is None or num_classes is None:
        return batch, None
    dropped = draws.drop_label < experiment.data.label_dropout
    labels = torch.from_numpy(images.labels[draws.indices]).masked_fill(dropped, num_classes)
    return batch, sent(labels, device)


# Of U-ViTs from 44 to 2 million parameters, compiling pays for itself after 80 to 4,000 steps (docs/results/speed.md).
UVIT_PAYS_AFTER = 5000


class DiffusionTask(Task):
    """A recipe's noise process, loss, sample grids and pipeline folders."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.compiling_pays_after = UVIT_PAYS_AFTER if experiment.model.backbone == "uvit" else None
        self.ema = experiment.ema
        self.optimizer_config = optimizer_at_batch_size(experiment.optimizer, experiment.train)
        self.reference_steps = reference_steps(experiment.train)
        self.process = experiment.noise_process()
        self.images: ImageSet
        self.guidance: Guidance | None = None

    def check(self) -> None:
        check_samples(self.experiment)

    def about(self) -> str:
        return f"attention {self.experiment.model.attention}"

    def build_model(self) -> nn.Module:
        model = build_model(self.experiment.model)
        if self.experiment.train.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if self.experiment.ssia.weight:
            seed = derive(self.experiment.seed, WEIGHTS, 1)  # WEIGHTS, 0 is the model's
            self.guidance = Guidance(model, self.experiment.ssia.reduction, seed)
        return model

    def parameter_groups(self, model: Any) -> list[dict[str, Any]]:
        return parameter_groups(model, self.optimizer_config)

    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        config = self.optimizer_config
        return torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=(config.betas[0], config.betas[1]),
            weight_decay=config.weight_decay,
            fused=True,
        )

    def learning_rate(self, step: int, peak: float) -> float:
        return learning_rate(self.optimizer_config, step, self.experiment.train.max_steps, peak)

    def first_weights(self, model: Any) -> dict[str, Any] | None:
        source = self.experiment.init_from
        return None if source is None else start_from(source, model, self.experiment)

    def same_start(self, kept: dict[str, Any] | None) -> dict[str, Any] | None:
        return same_start(kept, self.experiment.init_from)

    def open_images(self, accelerator: Accelerator, reporter: Reporter) -> ImageSet:
        self.images = open_training_images(self.experiment, accelerator, reporter)
        return self.images

    def draw(self, step: int, start: int, stop: int) -> StepDraws:
        seed, batch_size, shape = self.experiment.seed, self.experiment.train.batch_size, self.images.images.shape[1:]
        return draw_step(seed, step, batch_size, len(self.images), shape, start, stop)

    def loss(self, network: nn.Module, draws: StepDraws, device: torch.device, dtype: torch.dtype) -> Tensor:
        images, labels = training_batch(self.images, self.experiment, draws, device, dtype)
        loss = diffusion_loss(network, self.process, images, draws, labels)
        return loss if self.guidance is None else loss + self.experiment.ssia.weight * self.guidance.take()

    def shows_at(self, step: int) -> bool:
        every = self.experiment.train.sample_every
        return every > 0 and step % every == 0

    def show(self, moment: Moment) -> dict[str, float]:
        """Draws the grid that is due, and leaves the averaged weights as a pipeline folder."""
        on_rank_zero(moment.accelerator, lambda: self._draw_and_save(moment))
        return {}

    def _draw_and_save(self, moment: Moment) -> None:
        assert moment.weights is not None
        grid = moment.folder.samples / f"{step_name(moment.step)}.png"
        pipeline = build_pipeline(self.experiment, without_heads(moment.weights), moment.accelerator.device)
        if self.experiment.train.sample_every and (self.shows_at(moment.step) or moment.checkpoint):
            try:
                save_samples(pipeline, self.experiment, grid)
            except (InputError, RunError) as error:  # as too little memory; the training needs no grid
                moment.reporter.message(f"step {moment.step:,}: no grid, {error}")
        if moment.checkpoint:
            save_pipeline(pipeline, moment.folder.pipelines / step_name(moment.step), moment.origin, grid)
