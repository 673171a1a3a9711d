"""What a step minimises, and how large a step it takes."""

import math
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dia_diffusion.errors import InputError
from dia_diffusion.models.attached import AttachedModel
from dia_diffusion.models.uvit import UViT
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.training.config import OptimizerConfig, TrainConfig
from dia_diffusion.training.randomness import StepDraws
from dia_diffusion.transfer import sent


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
    return replace(config, betas=betas, warmup_steps=round(config.warmup_steps / steps))


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
