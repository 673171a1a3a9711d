"""Tiny diffusers networks with seeded weights, for pipelines like those that others publish."""

from typing import Any

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DModel, VQModel

NULL_LABEL = 1000  # hard-coded in DiTPipeline


def small_unet(**changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    }
    return UNet2DModel(**sizes | changes).eval()


def small_dit(num_classes: int = NULL_LABEL, out_channels: int = 8, in_channels: int = 4) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=in_channels,
        out_channels=out_channels,
        num_layers=1,
        sample_size=4,
        num_embeds_ada_norm=num_classes,
        norm_num_groups=4,
    )
    for parameter in dit.parameters():  # with its initial weights, all classes give the same output
        torch.nn.init.normal_(parameter, std=0.2)
    return dit.eval()


SMALL_DECODER: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


def small_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(latent_channels=4, **SMALL_DECODER).eval()


def small_vqvae() -> VQModel:
    torch.manual_seed(0)
    vqvae = VQModel(latent_channels=3, num_vq_embeddings=16, **SMALL_DECODER)
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)  # clearly different codes
    return vqvae.eval()
