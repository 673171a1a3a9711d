"""Parameter groups, learning rates, and conversion of settings to another batch size."""

import math
from typing import Any

from torch import nn

from dia_diffusion.errors import InputError
from dia_diffusion.training.config import ClassifyOptimizerConfig, OptimizerConfig, TrainConfig


def parameter_groups(model: Any, rate: float, unit_rate: float | None = None) -> list[dict[str, Any]]:
    """One group of all parameters with its "peak_rate", or a second group for the unit's parameters with their own.

    Models register the unit last, so the concatenated groups are in the order of model.parameters().

    Raises:
        InputError: a rate for a unit without parameters.
    """
    parameters: list[nn.Parameter] = list(model.parameters())
    if unit_rate is None:
        return [{"params": parameters, "peak_rate": rate}]
    count = 0 if model.unit is None else len(list(model.unit.parameters()))
    if count == 0:
        raise InputError(
            f"`optimizer.unit_learning_rate` must be null for the unit {model.config.attention!r}, which has no "
            f"parameters, got {unit_rate}"
        )
    return [
        {"params": parameters[:-count], "peak_rate": rate},
        {"params": parameters[-count:], "peak_rate": unit_rate},
    ]


def learning_rate(
    config: OptimizerConfig | ClassifyOptimizerConfig, step: int, max_steps: int, peak: float | None = None
) -> float:
    """The rate of a step, counted from 0: linear warm-up to `peak`, then the schedule.

    peak: None is config.learning_rate.
    """
    peak = config.learning_rate if peak is None else peak
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    progress = min((step - config.warmup_steps) / max(1, max_steps - config.warmup_steps), 1.0)
    if config.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "linear":
        return peak * (1 - progress)
    if config.schedule == "warmup-stable-decay":
        return peak * min(1.0, (max_steps - step) / (config.decay_fraction * max_steps))
    if config.schedule == "steps":
        return peak * config.gamma ** sum(step >= milestone for milestone in config.milestones)
    return peak


def reference_steps(config: TrainConfig) -> float:
    """The number of steps at the reference batch size with as many images as one step; 1 without a reference."""
    return 1.0 if config.reference_batch_size is None else config.batch_size / config.reference_batch_size


def optimizer_at_batch_size(config: OptimizerConfig, train: TrainConfig) -> OptimizerConfig:
    """The settings at train.batch_size: half-lives and warm-up have the same length in images as at the reference.

    beta2' = beta2^(B'/B), at the same learning rate (arXiv 2507.07101). beta1 and Muon's momentum are converted in the
    same way if the recipe says so.
    """
    steps = reference_steps(train)
    beta1, beta2 = config.betas
    momentum_steps = steps if config.beta1_in_images else 1.0
    return config.model_copy(
        update={
            "betas": [beta1**momentum_steps, beta2**steps],
            "muon_momentum": config.muon_momentum**momentum_steps,
            "warmup_steps": round(config.warmup_steps / steps),
        }
    )
