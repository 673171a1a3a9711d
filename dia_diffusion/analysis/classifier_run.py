"""A run of `dia-diffusion classify` for the analyses: classifier folders, augmented images, cross entropy."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_diffusion.analysis.trained_run import Batch, TrainedRun
from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.errors import InputError
from dia_diffusion.io import step_folders
from dia_diffusion.models.classifiers import build_classifier, load_classifier, normalized
from dia_diffusion.training.augmentation import ImageDraws, draw_images
from dia_diffusion.training.classification import Batches
from dia_diffusion.training.config import ClassifyExperiment
from dia_diffusion.training.randomness import WEIGHTS, derive
from dia_diffusion.training.recipe import read_experiment


class ClassifierRun(TrainedRun):
    """A classifier's run folder, opened for reading. It keeps no averaged weights: "ema" and "raw" are the same.

    Raises:
        InputError: no classifiers in it yet.
    """

    has_times = False
    kinds = {"ema": "classifier", "raw": "classifier"}  # noqa: RUF012 - the base class declares it

    def __init__(self, path: str | Path, device: torch.device | None = None):
        super().__init__(path, device)
        self.experiment = read_experiment(str(self.folder.config), kind=ClassifyExperiment)
        model, train = self.experiment.model, self.experiment.train
        self.unit, self.unit_kwargs = model.attention or "none", model.attention_kwargs
        self.batch_size, self.seed = train.batch_size, self.experiment.seed
        self.classifiers = step_folders(self.folder.classifiers)
        if not self.classifiers:
            raise InputError(f"{path} has no classifiers yet")

    def places(self, weights: str) -> dict[int, Path]:
        return self.classifiers

    def first_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.experiment.seed, WEIGHTS))
            return build_classifier(self.experiment.model).eval().to(self.device)

    def _load(self, step: int, weights: str) -> nn.Module:
        return load_classifier(self.classifiers[step], self.device).model

    def images_key(self, source: str | None) -> tuple[Any, ...]:
        data = self.experiment.data
        size = None if data.augmentation == "resized-crop" else self.experiment.model.sample_size
        return (source or data.source, data.split, size)

    def open_images(self, source: str | None, progress: Callable[[int, int], None] | None) -> ImageSet:
        place, split, size = self.images_key(source)
        return open_images(place, split=split, size=size, channels=3, decode=size is not None, progress=progress)

    def trained_on(self) -> str | None:
        training = load_classifier(list(self.classifiers.values())[-1]).training
        return training["data"].get("fingerprint") if training else None

    def draw(self, seed: int, number: int, count: int) -> ImageDraws:
        return draw_images(seed, number, count, len(self.images))

    def batches(self, draws: ImageDraws, num_times: int, batch_size: int) -> Iterator[Batch]:
        count = len(draws.indices)
        for start in range(0, count, batch_size):
            part = draws.slice(start, min(start + batch_size, count))
            yield Batch(0, slice(start, start + len(part.indices)), partial(self.training_losses, draws=part))

    def training_losses(self, model: nn.Module, draws: ImageDraws) -> Tensor:
        batches = Batches(self.images, self.experiment, lambda step, start, stop: draws)
        # The last step of a run is followed by none whose images would be decoded ahead.
        pixels, labels = batches.take(replace(draws, step=self.experiment.train.max_steps), self.device)
        images = normalized(pixels, self.experiment.data.mean, self.experiment.data.std)
        smoothing = self.experiment.train.label_smoothing
        return F.cross_entropy(model(images), labels, label_smoothing=smoothing, reduction="none")
