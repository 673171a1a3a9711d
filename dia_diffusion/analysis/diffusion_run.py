"""A run of `dia-diffusion train` for the analyses: pipelines, checkpoints, noisy images at spread times."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dia_diffusion.analysis.trained_run import Batch, TrainedRun, spread
from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.errors import InputError
from dia_diffusion.io import step_folders
from dia_diffusion.pipelines.folder import read_training
from dia_diffusion.sampling.load import load_pipeline
from dia_diffusion.training.checkpoint import load_checkpoint, load_weights
from dia_diffusion.training.diffusion import build_model, image_losses, training_batch
from dia_diffusion.training.randomness import WEIGHTS, StepDraws, derive, draw_step
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.ssia import without_heads


class DiffusionRun(TrainedRun):
    """A diffusion model's run folder, opened for reading.

    Raises:
        InputError: no pipelines in it yet.
    """

    has_times = True
    kinds = {"ema": "pipeline", "raw": "checkpoint"}  # noqa: RUF012 - the base class declares it

    def __init__(self, path: str | Path, device: torch.device | None = None):
        super().__init__(path, device)
        self.experiment = read_experiment(str(self.folder.config))
        self.process = self.experiment.noise_process()
        model, train = self.experiment.model, self.experiment.train
        self.unit, self.unit_kwargs = model.attention or "none", model.attention_kwargs
        self.batch_size, self.seed = train.batch_size, self.experiment.seed
        self.pipelines = step_folders(self.folder.pipelines)
        if not self.pipelines:
            raise InputError(f"{path} has no pipelines yet")

    @property
    def starts_at_first_weights(self) -> bool:
        return self.experiment.init_from is None

    def places(self, weights: str) -> dict[int, Path]:
        return self.pipelines if weights == "ema" else step_folders(self.folder.checkpoints)

    def first_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.experiment.seed, WEIGHTS))
            return build_model(self.experiment.model).eval().to(self.device)

    def _load(self, step: int, weights: str) -> nn.Module:
        if weights == "ema":
            return load_pipeline(self.folder.path, self.device, step=step).unet
        place, model = self.places(weights)[step], self.first_model()
        load_weights(model, without_heads(load_checkpoint(place).tensors["model"]), place)
        return model

    def images_key(self, source: str | None) -> tuple[Any, ...]:
        data, model = self.experiment.data, self.experiment.model
        return (source or data.source, data.split, model.sample_size, model.in_channels)

    def open_images(self, source: str | None, progress: Callable[[int, int], None] | None) -> ImageSet:
        place, split, size, channels = self.images_key(source)
        return open_images(place, split=split, size=size, channels=channels, progress=progress)

    def trained_on(self) -> str | None:
        training = read_training(list(self.pipelines.values())[-1])
        return training["data"].get("fingerprint") if training else None

    def draw(self, seed: int, number: int, count: int) -> StepDraws:
        return draw_step(seed, number, count, len(self.images), self.images.shape)

    def batch(self, draws: StepDraws) -> tuple[Tensor, Tensor | None]:
        """Images (B, C, H, W) in [-1, 1] and labels (B,), prepared as the run's training does."""
        return training_batch(self.images, self.experiment, draws, self.device, torch.float32)

    def batches(self, draws: StepDraws, num_times: int, batch_size: int) -> Iterator[Batch]:
        count = len(draws.indices)
        for start in range(0, count, batch_size):
            part = draws.slice(start, min(start + batch_size, count))
            images, labels = self.batch(part)
            for index, uniform in enumerate(spread(num_times)):
                at_time = replace(part, uniform=uniform.expand(len(images)))
                losses = partial(self._losses, images=images, draws=at_time, labels=labels)
                yield Batch(index, slice(start, start + len(images)), losses)

    def training_losses(self, model: nn.Module, draws: StepDraws) -> Tensor:
        images, labels = self.batch(draws)
        return self._losses(model, images, draws, labels)

    def _losses(self, model: nn.Module, images: Tensor, draws: StepDraws, labels: Tensor | None) -> Tensor:
        return image_losses(model, self.process, images, draws, labels)
