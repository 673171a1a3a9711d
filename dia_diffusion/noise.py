"""The noise process, in closed form: the project's one definition of alpha and sigma.

    x_t = alpha(t) x_0 + sigma(t) epsilon,   alpha^2 + sigma^2 = 1

Training draws t and mixes with it here; samplers get the same process as diffusers' `trained_betas`. Time is what the
network sees: 999 t for the continuous VP process (t in [0, 1]), the step 0..999 for the discrete ones.

Everything that depends on time alone is computed in float64 on the CPU and sent to the device in the sample's dtype:
some devices, such as Apple's MPS, have no float64, and a CUDA GPU is not waited for.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dia_diffusion.distributed import sent
from dia_diffusion.errors import InputError
from dia_diffusion.noise_names import LOSS_WEIGHTINGS, PREDICTION_TYPES, SCHEDULES

NUM_TIMESTEPS = 1000
BETA_MIN, BETA_MAX = 0.1, 20.0  # of the VP-SDE (Song et al. 2021, appendix C), as U-ViT uses it
MIN_SNR_GAMMA = 5.0  # of Hang et al. 2023
# At t = 0 the signal-to-noise ratio is infinite, which no table of betas can hold.
SMALLEST_TABLE_TIME = 1e-4


def vp_log_alpha_bar(t: Tensor) -> Tensor:
    """log alpha^2 of the VP process at t in [0, 1]: minus the integral of beta from 0 to t."""
    return -(BETA_MIN * t + 0.5 * (BETA_MAX - BETA_MIN) * t**2)


@dataclass(frozen=True)
class NoiseProcess:
    """A noise schedule with what the network predicts.

    Args:
        schedule: "vp-continuous" (VP-SDE, beta 0.1..20, t uniform on [0, 1]), "ddpm-linear" (Ho et al. 2020) or
            "cosine" (Nichol and Dhariwal 2021), the last two with 1,000 discrete steps.
        prediction_type: "epsilon", "sample" (x_0) or "v_prediction" (alpha epsilon - sigma x_0).
        loss_weighting: "uniform", or "min-snr" (Hang et al. 2023).
    """

    schedule: str = "vp-continuous"
    prediction_type: str = "epsilon"
    loss_weighting: str = "uniform"

    def __post_init__(self) -> None:
        for value, accepted in (
            (self.schedule, SCHEDULES),
            (self.prediction_type, PREDICTION_TYPES),
            (self.loss_weighting, LOSS_WEIGHTINGS),
        ):
            if value not in accepted:
                raise InputError(f"unknown noise setting {value!r}; accepted: {', '.join(accepted)}")

    def timestep(self, uniform: Tensor) -> Tensor:
        """Network times (B,) from numbers drawn uniformly from [0, 1)."""
        if self.schedule == "vp-continuous":
            return uniform * (NUM_TIMESTEPS - 1)
        return (uniform * NUM_TIMESTEPS).long()

    def log_alpha_bar(self, timestep: Tensor) -> Tensor:
        """log alpha^2 (B,), float64 on the CPU, at network times (B,); the device is waited for if they are on one."""
        timestep = timestep.cpu()
        if self.schedule == "vp-continuous":
            return vp_log_alpha_bar(timestep.double() / (NUM_TIMESTEPS - 1))
        return torch.log1p(-self._betas).cumsum(0)[timestep]

    def alpha_sigma(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma (B,), float64 on the CPU, at network times (B,)."""
        log_alpha_bar = self.log_alpha_bar(timestep)
        return (0.5 * log_alpha_bar).exp(), (-torch.expm1(log_alpha_bar)).sqrt()

    def mix(self, sample: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy sample x_t and the network's target, both like sample (B, C, H, W).

        timestep: (B,), on the CPU, so that no device is waited for.
        """
        factors = torch.stack(self.alpha_sigma(timestep)).to(sample.dtype)  # (2, B)
        alpha, sigma = sent(factors, sample.device)[..., None, None, None]
        noisy = alpha * sample + sigma * noise
        if self.prediction_type == "epsilon":
            return noisy, noise
        if self.prediction_type == "sample":
            return noisy, sample
        return noisy, alpha * noise - sigma * sample

    def loss_weight(self, timestep: Tensor) -> Tensor:
        """Weights (B,), float32 on the CPU, of the squared errors at network times (B,)."""
        if self.loss_weighting == "uniform":
            return torch.ones(timestep.shape, dtype=torch.float32)
        log_alpha_bar = self.log_alpha_bar(timestep)
        snr = 1 / torch.expm1(-log_alpha_bar)
        clipped = snr.clamp(max=MIN_SNR_GAMMA)
        # min(snr, gamma) weighs errors in x_0; the other predictions' errors are those times snr or snr + 1, which is
        # infinite at t = 0 and makes the weight 0 there.
        scale = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[self.prediction_type]
        return (clipped / scale).float()

    def scheduler_config(self) -> dict[str, object]:
        """What any diffusers scheduler needs to run this process backwards."""
        return {
            "num_train_timesteps": NUM_TIMESTEPS,
            "trained_betas": self.betas().tolist(),
            "prediction_type": self.prediction_type,
        }

    def betas(self) -> Tensor:
        """beta (1000,), float64, with prod(1 - beta) = alpha^2 at the network times 0..999."""
        return self._betas.clone()

    @cached_property
    def _betas(self) -> Tensor:
        steps = torch.arange(NUM_TIMESTEPS, dtype=torch.float64)
        if self.schedule == "ddpm-linear":
            return torch.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=torch.float64)
        if self.schedule == "cosine":
            edges = torch.arange(NUM_TIMESTEPS + 1, dtype=torch.float64) / NUM_TIMESTEPS
            alpha_bar = ((edges + 0.008) / 1.008 * math.pi / 2).cos() ** 2
            return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        log_alpha_bar = vp_log_alpha_bar((steps / (NUM_TIMESTEPS - 1)).clamp(min=SMALLEST_TABLE_TIME))
        return -torch.expm1(torch.diff(log_alpha_bar, prepend=torch.zeros(1, dtype=torch.float64)))
