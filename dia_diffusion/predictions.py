"""Prediction types of networks, conversions between them, and the weighting of their errors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dia_diffusion.registry import Registry

MIN_SNR_GAMMA = 5.0  # Hang et al. 2023


@dataclass(frozen=True)
class PredictionType:
    """A prediction type. alpha and sigma are floats, or tensors that broadcast with the images.

    target: (x_0, noise, alpha, sigma) -> what the network should predict.
    noise: (prediction, x_t, alpha, sigma) -> the noise in x_t according to the network.
    error_scale: signal-to-noise ratio -> squared error of the prediction over the squared error of the x_0 it implies.
    image: (prediction, x_t, alpha, sigma) -> the x_0 it implies; None computes it from the noise, dividing by alpha.
    """

    target: Callable[[Tensor, Tensor, Any, Any], Tensor]
    noise: Callable[[Tensor, Tensor, Any, Any], Tensor]
    error_scale: Callable[[Tensor], Tensor]
    image: Callable[[Tensor, Tensor, Any, Any], Tensor] | None = None


PREDICTION_TYPES: Registry[PredictionType] = Registry("prediction type")


PREDICTION_TYPES.register(
    "epsilon",
    PredictionType(
        target=lambda image, noise, alpha, sigma: noise,
        noise=lambda prediction, sample, alpha, sigma: prediction,
        error_scale=lambda snr: snr,
    ),
)


PREDICTION_TYPES.register(
    "sample",
    PredictionType(
        target=lambda image, noise, alpha, sigma: image,
        noise=lambda prediction, sample, alpha, sigma: (sample - alpha * prediction) / sigma,
        error_scale=torch.ones_like,
        image=lambda prediction, sample, alpha, sigma: prediction,
    ),
)


PREDICTION_TYPES.register(  # Salimans and Ho 2022; inverted with alpha^2 + sigma^2 = 1
    "v_prediction",
    PredictionType(
        target=lambda image, noise, alpha, sigma: alpha * noise - sigma * image,
        noise=lambda prediction, sample, alpha, sigma: alpha * prediction + sigma * sample,
        error_scale=lambda snr: snr + 1,
    ),
)


PREDICTION_TYPES.register(  # dx_t / dt of the flow
    "velocity",
    PredictionType(
        target=lambda image, noise, alpha, sigma: noise - image,
        noise=lambda prediction, sample, alpha, sigma: (sample + alpha * prediction) / (alpha + sigma),
        error_scale=lambda snr: (snr.sqrt() + 1) ** 2,
        image=lambda prediction, sample, alpha, sigma: (sample - sigma * prediction) / (alpha + sigma),
    ),
)


def convert_prediction(prediction: Tensor, sample: Tensor, alpha: Any, sigma: Any, given: str, wanted: str) -> Tensor:
    """Converts a prediction for x_t = sample from type `given` to type `wanted`; both are names in PREDICTION_TYPES."""
    kind = PREDICTION_TYPES[given]
    noise = kind.noise(prediction, sample, alpha, sigma)
    image = (sample - sigma * noise) / alpha if kind.image is None else kind.image(prediction, sample, alpha, sigma)
    return PREDICTION_TYPES[wanted].target(image, noise, alpha, sigma)


LOSS_WEIGHTINGS: Registry[Callable[[Tensor, PredictionType], Tensor]] = Registry("loss weighting")
"""(signal-to-noise ratios (B,), prediction type) -> weights (B,) of the squared errors of the prediction."""

LOSS_WEIGHTINGS.register("uniform", lambda snr, prediction: torch.ones_like(snr))
# min(snr, gamma) weights the errors of x_0. At t = 0 the ratio is infinite, which makes an epsilon's weight 0.
LOSS_WEIGHTINGS.register("min-snr", lambda snr, prediction: snr.clamp(max=MIN_SNR_GAMMA) / prediction.error_scale(snr))
