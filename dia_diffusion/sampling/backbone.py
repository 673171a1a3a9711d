"""Others' networks in UViTPipeline's loop: DDPMPipeline's and its like, in pixels; DiTPipeline's, in latents."""

import copy
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
    VQModel,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from dia_diffusion.errors import InputError
from dia_diffusion.models.uvit import UViTOutput
from dia_diffusion.pipelines.pipeline_uvit import UViTPipeline

# Pipelines whose own loop is UViTPipeline's: the names of their network, and of the decoder of its latents.
LOOPED_PIPELINES: dict[str, tuple[str, str | None]] = {
    "UViTPipeline": ("unet", None),
    "DDPMPipeline": ("unet", None),
    "DDIMPipeline": ("unet", None),
    "PNDMPipeline": ("unet", None),
    "ConsistencyModelPipeline": ("unet", None),
    "LDMPipeline": ("unet", "vqvae"),
    "DiTPipeline": ("transformer", "vae"),
}
DECODERS = (AutoencoderKL, VQModel, AutoencoderTiny)


class Backbone(nn.Module):
    """A UNet2DModel or DiT as UViTPipeline calls it, the null label of a DiT being its number of classes."""

    def __init__(self, network: UNet2DModel | DiTTransformer2DModel):
        super().__init__()
        self.network = network
        self.in_channels: int = network.config.in_channels
        self.sample_size = network.config.sample_size
        self.has_null_label = isinstance(network, DiTTransformer2DModel)
        self.num_classes: int | None = network.config.get(
            "num_embeds_ada_norm" if self.has_null_label else "num_class_embeds"
        )

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> UViTOutput:
        """sample (B, C, H, W) -> (B, C, H, W), or (B, 2 C, H, W) where the network predicts a variance too."""
        timesteps = timestep.to(sample.device).expand(len(sample))
        if class_labels is None and self.has_null_label and self.num_classes is not None:
            class_labels = torch.full((len(sample),), self.num_classes, device=sample.device)
        return UViTOutput(sample=self.network(sample, timesteps, class_labels=class_labels).sample)


class BackbonePipeline(UViTPipeline):
    """UViTPipeline's loop around a Backbone, with the decoder of its latents where it has one."""

    def __init__(self, unet: Any, scheduler: SchedulerMixin, vae: Any = None):
        super().__init__(unet=unet, scheduler=scheduler)
        self.register_modules(vae=vae)

    def _predict(self, sample: Tensor, timestep: Tensor, labels: Tensor | None, guidance_scale: float) -> Tensor:
        prediction = super()._predict(sample, timestep, labels, guidance_scale)
        # Of all schedulers, only DDPM's goes by a predicted variance.
        takes_variance = isinstance(self.scheduler, DDPMScheduler) and self.scheduler.config.variance_type in (
            "learned",
            "learned_range",
        )
        return prediction if takes_variance else prediction[:, : self.unet.in_channels]

    def _to_images(self, sample: Tensor) -> Tensor:
        if self.vae is not None:
            sample = self.vae.decode((sample / self.vae.config.scaling_factor).to(self.vae.dtype)).sample.float()
        return super()._to_images(sample)


def looped_pipeline(pipeline: DiffusionPipeline) -> UViTPipeline:
    """UViTPipeline's loop around the parts of a pipeline of LOOPED_PIPELINES, with a copy of its scheduler.

    Raises:
        InputError: a network or a decoder of another kind, or a network that takes other than class numbers.
    """
    name = type(pipeline).__name__
    network_name, decoder_name = LOOPED_PIPELINES[name]
    network = getattr(pipeline, network_name)
    if isinstance(network, UNet2DModel | DiTTransformer2DModel):
        if embedding := network.config.get("class_embed_type"):
            raise InputError(f"the model of this {name} takes a {embedding} as its label; accepted: classes by number")
        network = Backbone(network)
    elif not hasattr(network, "num_classes"):  # neither a UViT nor what is called alike
        accepted = "UNet2DModel, DiTTransformer2DModel or UViT"
        raise InputError(f"the {network_name} of this {name} is a {type(network).__name__}; accepted: {accepted}")
    decoder = None if decoder_name is None else getattr(pipeline, decoder_name)
    if decoder_name is not None and not isinstance(decoder, DECODERS):
        accepted = ", ".join(kind.__name__ for kind in DECODERS)
        raise InputError(f"the {decoder_name} of this {name} is a {type(decoder).__name__}; accepted: {accepted}")
    return BackbonePipeline(network, copy.deepcopy(pipeline.scheduler), decoder)
