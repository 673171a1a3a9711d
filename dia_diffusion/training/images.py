"""The images a recipe trains on."""

import torch
from accelerate import Accelerator
from torch import Tensor

from dia_diffusion.data import ImageSet
from dia_diffusion.data.open_together import open_images_together
from dia_diffusion.errors import InputError
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.randomness import StepDraws
from dia_diffusion.training.reporter import Reporter
from dia_diffusion.transfer import sent


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
