"""Training of a noise predictor: what the engine leaves to diffusion."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dia_diffusion.data import ImageSet
from dia_diffusion.distributed import on_main
from dia_diffusion.errors import InputError, RunError
from dia_diffusion.files import step_name
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.images import open_training_images, training_batch
from dia_diffusion.training.init_from import same_start, start_from
from dia_diffusion.training.objective import (
    diffusion_loss,
    learning_rate,
    optimizer_at_batch_size,
    parameter_groups,
    reference_steps,
)
from dia_diffusion.training.randomness import WEIGHTS, StepDraws, derive, draw_step
from dia_diffusion.training.reporter import Reporter
from dia_diffusion.training.snapshot import build_model, build_pipeline, check_samples, save_pipeline, save_samples
from dia_diffusion.training.ssia import Guidance, without_heads
from dia_diffusion.training.task import Moment, Task

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
            groups, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
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
        on_main(moment.accelerator, lambda: self._draw_and_save(moment))
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
