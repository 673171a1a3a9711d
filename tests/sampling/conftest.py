import math

import pytest
import torch
from diffusers import ConfigMixin, DPMSolverMultistepScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from dia_diffusion import UViT, UViTPipeline
from dia_diffusion.models.uvit import UViTOutput
from dia_diffusion.noise import NoiseProcess


def alpha_sigma(schedule: str, timestep: float) -> tuple[float, float]:
    """alpha and sigma of x_t = alpha image + sigma noise, in closed form: U-ViT's VP process, or the flow."""
    if schedule == "flow":
        return 1 - timestep / 1000, timestep / 1000
    t = timestep / 999
    alpha = math.exp(-0.5 * (0.1 * t + 0.5 * 19.9 * t**2))
    return alpha, (1 - alpha**2) ** 0.5


class GaussianDenoiser(ModelMixin, ConfigMixin):
    """The exact denoiser of pixels from N(data_mean, data_std^2); records its timesteps and its inputs' std errors."""

    data_mean, data_std = 0.1, 0.2

    @register_to_config
    def __init__(self, prediction_type: str = "epsilon", sample_size: int = 128, schedule: str = "vp-continuous"):
        super().__init__()
        self.in_channels, self.sample_size, self.num_classes = 1, sample_size, None
        self.weight = torch.nn.Parameter(torch.zeros(1))  # diffusers reads dtype and device from it
        self.timesteps: list[float] = []
        self.std_errors: list[float] = []

    def alpha_sigma(self, timestep: float) -> tuple[float, float]:
        return alpha_sigma(self.config.schedule, timestep)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> UViTOutput:
        alpha, sigma = self.alpha_sigma(float(timestep))
        variance = alpha**2 * self.data_std**2 + sigma**2
        noise = sigma * (sample - alpha * self.data_mean) / variance
        image = self.data_mean + alpha * self.data_std**2 * (sample - alpha * self.data_mean) / variance
        self.timesteps.append(float(timestep))
        self.std_errors.append(float(sample.std()) / variance**0.5 - 1)
        velocities = {"v_prediction": alpha * noise - sigma * image, "velocity": noise - image}
        outputs = {"epsilon": noise, "sample": image, **velocities}
        return UViTOutput(sample=outputs[self.config.prediction_type])


def vp_scheduler(prediction_type: str = "epsilon") -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(**NoiseProcess(prediction_type=prediction_type).scheduler_config())


@pytest.fixture
def gaussian_pipeline():
    """Makes a pipeline with the exact denoiser of Gaussian data."""

    def make(prediction_type: str = "epsilon") -> UViTPipeline:
        pipeline = UViTPipeline(unet=GaussianDenoiser(prediction_type), scheduler=vp_scheduler(prediction_type))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture
def tiny_pipeline():
    """Makes a pipeline with a small random UViT that predicts images with some contrast."""

    def make(num_classes: int | None = None) -> UViTPipeline:
        torch.manual_seed(0)
        unet = UViT(
            sample_size=8,
            patch_size=4,
            hidden_size=32,
            num_layers=3,
            num_attention_heads=2,
            num_classes=num_classes,
            initialization="xavier",
        )
        torch.nn.init.normal_(unet.patch_embed.weight)  # the input outweighs the position embedding
        return UViTPipeline(unet=unet.eval(), scheduler=vp_scheduler("sample"))

    return make
