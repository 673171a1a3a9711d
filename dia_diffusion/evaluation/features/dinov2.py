"""The features `dinov2-vit-{s,b,l,g}-14`: the class token of DINOv2 after the last norm, through timm."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dia_diffusion.download import Download
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features.pretrained import IMAGE_SIZE, PretrainedNetwork, Tensors

RELEASED = {
    "s": ("b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9", 88_283_115),
    "b": ("0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73", 346_378_731),
    "l": ("d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428", 1_217_586_395),
    "g": ("baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3", 4_546_108_579),
}
"""Size -> sha256 and bytes of Meta's file (Apache-2.0)."""
TIMM_NAMES = {"s": "small", "b": "base", "l": "large", "g": "giant"}
PATCH, TRAINED_SIZE = 14, 518


def dinov2(size: str) -> PretrainedNetwork:
    """DINOv2 without registers; size: s, b, l or g."""
    file = f"dinov2_vit{size}14"
    release = Download(f"https://dl.fbaipublicfiles.com/dinov2/{file}/{file}_pretrain.pth", *RELEASED[size])
    timm_name = f"vit_{TIMM_NAMES[size]}_patch14_dinov2"
    return PretrainedNetwork(
        build=partial(_build, timm_name),
        rename=rename,
        finish=_to_image_size,
        files=f"{release.file}, or timm's safetensors of {timm_name}.lvd142m",
        release=release,
    )


def rename(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Meta's tensors under timm's names; tensors with timm's names stay as they are."""
    names = {name: name.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2.") for name in tensors}
    return {names[name]: tensor for name, tensor in tensors.items() if name != "mask_token"}


def resize_positions(positions: torch.Tensor, patches: int) -> torch.Tensor:
    """Position embeddings (1, 1 + N * N, D), the class token's first, for patches x patches patches.

    As in DINOv2's own code: bicubic, not antialiased, and sampled at the scale of patches + 0.1, unlike timm's
    resampling.
    """
    token, grid = positions[:, :1], positions[:, 1:]
    side = round(grid.shape[1] ** 0.5)
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(patches + 0.1) / side, mode="bicubic")
    return torch.cat([token, grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def _build(timm_name: str) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise InputError("DINOv2 needs the package timm: pip install 'dia-diffusion[features]'") from None
    return timm.create_model(timm_name, img_size=TRAINED_SIZE, num_classes=0)


def _to_image_size(network: Any) -> nn.Module:
    network.pos_embed = nn.Parameter(resize_positions(network.pos_embed.detach(), IMAGE_SIZE // PATCH))
    network.patch_embed.set_input_size(IMAGE_SIZE)
    return network


DINOV2 = {f"dinov2-vit-{size}-14": dinov2(size) for size in RELEASED}
