"""What a step minimises, and how large a step it takes."""

import math

from torch import Tensor, nn

from dia_diffusion.noise import NoiseProcess
from dia_diffusion.training.config import OptimizerConfig
from dia_diffusion.training.randomness import StepDraws


def diffusion_loss(
    model: nn.Module, process: NoiseProcess, images: Tensor, draws: StepDraws, labels: Tensor | None
) -> Tensor:
    """Weighted mean squared error over images (B, C, H, W) in [-1, 1]; float32 whatever the model computes in."""
    timestep = process.timestep(draws.uniform)  # (B,)
    noisy, target = process.mix(images, draws.noise.to(images), timestep)
    (prediction,) = model(noisy, timestep.to(images.device), labels, return_dict=False)
    error = (prediction.to(images.dtype) - target).square().mean(dim=(1, 2, 3))  # (B,)
    return (error * process.loss_weight(timestep).to(error)).mean()


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """The rate of a step, counted from 0: linear warm-up, then constant or half a cosine down to zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
