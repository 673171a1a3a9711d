"""Classifiers by name, with attention units at the ends of their blocks."""

import re
from collections.abc import Callable

from torch import nn
from torchvision.models import VisionTransformer, resnet18, resnet34, resnet50

from dia_diffusion.attention.attach import attach
from dia_diffusion.attention.places import Position, in_stages, positions_of
from dia_diffusion.errors import InputError
from dia_diffusion.models.cifar_resnet import Layers, cifar_resnet, cifar_resnext, cifar_wrn
from dia_diffusion.models.classifier_config import BackboneConfig
from dia_diffusion.models.feature_resnet import FeatureResNet

FEATURE_RESNET = "feature-resnet"
RESNETS: dict[str, Callable[..., nn.Module]] = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50}
# ViT-S is DeiT's: torchvision has none.
VITS = {
    "vit_s_16": {"num_layers": 12, "num_heads": 6, "hidden_dim": 384, "mlp_dim": 1536},
    "vit_b_16": {"num_layers": 12, "num_heads": 12, "hidden_dim": 768, "mlp_dim": 3072},
}
PATTERNS = {
    "bottleneck": r"cifar-resnet(\d{1,3})",
    "basic": r"cifar-resnet(\d{1,3})-basic",
    "wrn": r"cifar-wrn(\d{1,3})-(\d{1,3})",
    "resnext": r"cifar-resnext(\d{1,3})-(\d{1,3})x(\d{1,3})",
}
ACCEPTED = (
    f"{', '.join([*RESNETS, *VITS, FEATURE_RESNET])}, cifar-resnetDEPTH (9 n + 2: 83, 164, 245), "
    "cifar-resnetDEPTH-basic (6 n + 2: 20, 56), cifar-wrnDEPTH-WIDEN (cifar-wrn52-4), "
    "cifar-resnextDEPTH-GROUPSxWIDTH (cifar-resnext101-8x32)"
)


def build_classifier(config: BackboneConfig, sync_batchnorm: bool = False) -> nn.Module:
    """Images (B, 3, H, W) -> logits (B, num_classes), with first weights from torch's default generator.

    The unit's come from a generator of their own: the backbone starts the same with any unit.

    sync_batchnorm: makes every BatchNorm one over all processes.

    Raises:
        InputError: an unknown backbone or unit, or options that don't fit it.
    """
    has_unit = config.attention not in (None, "none")
    model = _backbone(config, has_unit)
    if sync_batchnorm:  # before units are attached to BatchNorms, which this replaces by others without their hooks
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if has_unit:
        assert config.attention is not None
        attachment = attach(model, config.attention, at=_places(model, config), **(config.attention_kwargs or {}))
        if sync_batchnorm:
            nn.SyncBatchNorm.convert_sync_batchnorm(attachment.units)
    elif config.attention_kwargs or config.attention_stages is not None or config.attention_blocks is not None:
        raise InputError("model.attention is none; accepted: no attention_kwargs, attention_stages, attention_blocks")
    return model


def _backbone(config: BackboneConfig, has_unit: bool) -> nn.Module:
    name, classes = config.backbone, config.num_classes
    if classes < 2 or config.sample_size < 8 or not 0 <= config.dropout < 1:
        raise InputError(
            f"model.num_classes {classes}, sample_size {config.sample_size}, dropout {config.dropout}; accepted: 2 or "
            "more, 8 or more, from 0 to below 1"
        )
    if config.dropout and not name.startswith("cifar-wrn"):
        raise InputError(f"model.dropout is {config.dropout} and model.backbone {name}; accepted: 0, or cifar-wrn")
    # A norm before the unit, where a branch has none: as the published networks have it, and with units only.
    network = _cifar_network(config, Layers(config.norm, config.residual, branch_norm=has_unit))
    if network is not None:
        return network
    if config.norm != "batch" or not config.residual:
        raise InputError(f"model.norm and residual can't be changed of {name}; accepted: batch and true, or cifar-...")
    if name == FEATURE_RESNET:
        return FeatureResNet(classes)
    if name in RESNETS:
        return RESNETS[name](weights=None, num_classes=classes)
    if name in VITS:
        if config.sample_size % 16:
            raise InputError(f"model.sample_size {config.sample_size} is no multiple of {name}'s patches of 16")
        return VisionTransformer(config.sample_size, 16, num_classes=classes, **VITS[name])
    raise InputError(f"unknown model.backbone {name!r}; accepted: {ACCEPTED}")


def _cifar_network(config: BackboneConfig, layers: Layers) -> nn.Module | None:
    """The network that a name of PATTERNS stands for; None for other names."""
    for kind, pattern in PATTERNS.items():
        if (match := re.fullmatch(pattern, config.backbone)) is None:
            continue
        depth, *rest = (int(number) for number in match.groups())
        if kind == "wrn":
            return cifar_wrn(depth, rest[0], config.num_classes, layers, config.dropout)
        if kind == "resnext":
            return cifar_resnext(depth, rest[0], rest[1], config.num_classes, layers)
        return cifar_resnet(depth, config.num_classes, layers, basic=kind == "basic")
    return None


def _places(model: nn.Module, config: BackboneConfig) -> list[Position]:
    """The positions that carry the unit: in the chosen stages, the runs of one channel count, their first blocks."""
    stages = in_stages(positions_of(model))
    chosen, first = config.attention_stages, config.attention_blocks
    if chosen is not None and (not chosen or not set(chosen) <= set(range(len(stages)))):
        raise InputError(f"model.attention_stages is {chosen}; accepted: some of 0 to {len(stages) - 1}, or null")
    if first is not None and first < 1:
        raise InputError(f"model.attention_blocks is {first}; accepted: 1 or more, or null for all")
    return [
        position
        for index, stage in enumerate(stages)
        if chosen is None or index in chosen
        for position in stage[:first]
    ]
