"""The features `vgg16`: the second hidden layer of torchvision's VGG-16, as torch-fidelity's "fc2_relu"."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision.models import VGG, vgg16

from dia_diffusion.download import Download
from dia_diffusion.evaluation.features.pretrained import IMAGE_SIZE, PretrainedNetwork, Tensors

RELEASED = Download(
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    553_433_881,
)
"""torchvision's VGG16_Weights.IMAGENET1K_V1."""


def _as_they_are(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return dict(tensors)


def _to_second_layer(network: VGG) -> nn.Module:
    network.classifier = network.classifier[:5]  # linear, ReLU, dropout, linear, ReLU
    return network


VGG16 = PretrainedNetwork(
    build=vgg16,
    rename=_as_they_are,
    finish=_to_second_layer,
    files=f"{RELEASED.file} of torchvision, or a safetensors file of its tensors",
    release=RELEASED,
    resize=partial(interpolate_bilinear_2d_like_tensorflow1x, size=(IMAGE_SIZE, IMAGE_SIZE), align_corners=False),
)
