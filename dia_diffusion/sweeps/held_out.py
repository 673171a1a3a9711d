"""The loss on images that no training has seen, and that of the best constant, for trials that are compared."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.errors import InputError
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.sampling.load import load_pipeline
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.diffusion import image_losses, training_batch
from dia_diffusion.training.randomness import StepDraws, draw_step


@dataclass(frozen=True)
class HeldOut:
    """Held-out images, each with one noise at the same times, alike for all trials."""

    images: ImageSet
    count: int
    """Images; the first that seed 0 draws, flipped as in training."""
    num_times: int
    """The middles of so many equally likely parts of time."""

    def described(self) -> dict[str, Any]:
        """For records: which images, and how many times."""
        return {"images_fingerprint": self.images.fingerprint, "images": self.count, "times": self.num_times}

    def losses(self, experiment: Experiment) -> tuple[float, float]:
        """The mean loss of the averaged weights that a training has left, and that of the best constant."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        draws = draw_step(0, 0, self.count, len(self.images), self.images.shape)
        images, labels = training_batch(self.images, experiment, draws, device, torch.float32)
        process, model = experiment.noise_process(), load_pipeline(experiment.output, device).unet
        of_model, of_constant = [], []
        for number in range(self.num_times):
            time = torch.full((self.count,), (number + 0.5) / self.num_times)
            at_time = replace(draws, uniform=time)
            of_model.append(_model_loss(model, process, images, at_time, labels))
            of_constant.append(constant_loss(process, images, at_time))
        return float(torch.stack(of_model).mean()), float(torch.stack(of_constant).mean())


@torch.no_grad()
def _model_loss(
    model: nn.Module, process: NoiseProcess, images: Tensor, draws: StepDraws, labels: Tensor | None
) -> Tensor:
    parts = []
    for start in range(0, len(images), 64):
        part = slice(start, start + 64)
        own = None if labels is None else labels[part]
        parts.append(image_losses(model, process, images[part], draws.slice(start, start + 64), own))
    return torch.cat(parts).cpu().double().mean()


def constant_loss(process: NoiseProcess, images: Tensor, draws: StepDraws) -> Tensor:
    """The least mean loss of whoever doesn't look at the sample: the target's variance over images, weighted.

    draws: with one and the same time for all images.
    """
    timestep = process.timestep(draws.uniform)
    _, target = process.mix(images, draws.noise.to(images), timestep)  # (B, C, H, W)
    return target.cpu().double().var(dim=0, correction=1).mean() * process.loss_weight(timestep)[0].to(images.dtype)


def open_held_out(experiment: Experiment, source: str | None, count: int, num_times: int) -> HeldOut:
    """The held-out images: those of `source`, or the test part of what is trained on; `count` of them at most.

    Raises:
        InputError: no such images, or the classes of a class-conditional model are missing.
    """
    model = experiment.model
    place, split = source or experiment.data.source, "train" if source else "test"
    try:
        images = open_images(place, size=model.sample_size, channels=model.in_channels, split=split)
    except InputError as error:
        hint = "; --held-out SOURCE gives others" if source is None else ""
        raise InputError(f"held-out images: {error}{hint}") from None
    if model.num_classes is not None and images.labels is None:
        raise InputError(f"held-out images {images.name} have no classes, which model.num_classes needs")
    return HeldOut(images, min(count, len(images)), num_times)
