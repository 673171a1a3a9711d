"""The Euler-Maruyama solver of the reverse VP-SDE that U-ViT is evaluated with, as a diffusers scheduler.

    dx = -beta(t) (x / 2 + score(x, t)) dt + sqrt(beta(t)) dw,   score = -epsilon / sigma,   t from 1 to 0

Song et al. 2021, appendices B and C.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dia_diffusion.errors import InputError
from dia_diffusion.noise import BETA_MAX, BETA_MIN, ContinuousVP, vp_log_alpha_bar
from dia_diffusion.predictions import PREDICTION_TYPES
from dia_diffusion.schedulers import NUM_TIMESTEPS

VP = ContinuousVP()
SMALLEST_TIME = 1e-3  # the last time the network sees


@dataclass
class EulerMaruyamaSchedulerOutput(BaseOutput):
    """prev_sample: x at the next smaller time, shaped like the sample."""

    prev_sample: Tensor


class EulerMaruyamaScheduler(SchedulerMixin, ConfigMixin):
    """Euler-Maruyama over 0 and `num_inference_steps` equally spaced times in [1e-3, 1]; the last step adds no noise.

    The network gets 999 t, which is fractional. alpha, sigma and beta come from the process in closed form; the betas
    only serve to check that the model was trained with that process.

    Args:
        num_train_timesteps: 1000.
        trained_betas: the betas of the process "vp-continuous".
        prediction_type: "epsilon", "sample" or "v_prediction".

    Raises:
        InputError: betas of another process, or an unknown prediction type.
    """

    # So that from_config accepts the config of any of these.
    _compatibles = [kind.name for kind in KarrasDiffusionSchedulers]  # noqa: RUF012
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = NUM_TIMESTEPS,
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
    ):
        if prediction_type not in VP.prediction_types:
            accepted = ", ".join(VP.prediction_types)
            raise InputError(f"`prediction_type` must be one of {accepted}, got {prediction_type!r}")
        betas = torch.as_tensor(trained_betas if trained_betas is not None else [], dtype=torch.float64)
        # The tolerance allows for betas that were rounded to float32.
        if betas.shape != VP.betas.shape or not torch.allclose(betas, VP.betas, rtol=1e-5, atol=0):
            raise InputError(
                "`trained_betas` must be those of the process vp-continuous, which euler-maruyama solves, got others"
            )
        self.set_timesteps(NUM_TIMESTEPS)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Sets the times of the network calls, descending: `timesteps` (num_inference_steps,), float32, 999 t."""
        self.num_inference_steps = num_inference_steps
        self.times = [*torch.linspace(1, SMALLEST_TIME, num_inference_steps, dtype=torch.float64).tolist(), 0.0]
        self.timesteps = (NUM_TIMESTEPS - 1) * torch.tensor(self.times[:-1], dtype=torch.float32, device=device)
        self.step_index: int | None = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Counts steps from now on instead of looking up each timestep, which waits for the GPU."""
        self.step_index = begin_index

    def noise_ratio(self, timestep: Tensor) -> Tensor:
        """sigma / alpha at timesteps, for `dia_diffusion.schedulers.noise_ratio`."""
        return torch.expm1(-vp_log_alpha_bar(timestep / (NUM_TIMESTEPS - 1))).sqrt()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The unchanged sample: the network's input is x_t."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        variance_noise: Tensor | None = None,
    ) -> EulerMaruyamaSchedulerOutput | tuple[Tensor]:
        """One step backwards, to the next smaller time.

        Args:
            model_output: (B, C, H, W), what the network predicts at `timestep`.
            timestep: one of `timesteps`.
            sample: (B, C, H, W), x at `timestep`.
            generator: draws the step's noise; a list has one per image.
            return_dict: False returns a tuple.
            variance_noise: (B, C, H, W), the step's noise, of unit variance; None draws it from `generator`.
        """
        index = self.step_index
        if index is None:
            index = int((self.timesteps - timestep).abs().argmin())
        else:
            self.step_index = index + 1
        t, t_next = self.times[index], self.times[index + 1]
        beta = BETA_MIN + (BETA_MAX - BETA_MIN) * t
        sigma, noise_prediction = self._noise_prediction(model_output, sample, t)
        drift = -beta * (sample / 2 - noise_prediction / sigma)
        previous = sample + drift * (t_next - t)
        if t_next > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
                )
            previous = previous + math.sqrt(beta * (t - t_next)) * variance_noise
        return EulerMaruyamaSchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def _noise_prediction(self, model_output: Tensor, sample: Tensor, t: float) -> tuple[float, Tensor]:
        """sigma(t), and the noise in the sample according to the network."""
        log_alpha_bar = float(vp_log_alpha_bar(torch.tensor(t, dtype=torch.float64)))
        alpha, sigma = math.exp(log_alpha_bar / 2), math.sqrt(-math.expm1(log_alpha_bar))
        return sigma, PREDICTION_TYPES[self.config.prediction_type].noise(model_output, sample, alpha, sigma)
