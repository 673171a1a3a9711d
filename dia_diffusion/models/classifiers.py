"""Classifiers by name, with attention units at the ends of their blocks."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer, resnet18, resnet34, resnet50

from dia_diffusion.attention.insertion_points import Position, group_by_channels, insertion_points
from dia_diffusion.distributed import sent
from dia_diffusion.errors import InputError
from dia_diffusion.io import atomic_dir, step_folders, write_json
from dia_diffusion.models.attach import attach
from dia_diffusion.models.cifar_resnet import FeatureResNet, Layers, cifar_resnet, cifar_resnext, cifar_wrn
from dia_diffusion.models.classifier_config import BackboneConfig
from dia_diffusion.models.factory import check_layers, check_size, unusable
from dia_diffusion.reading import read_json_object, stored_shapes
from dia_diffusion.reading.typed import fits

FEATURE_RESNET = "feature-resnet"
RESNETS: dict[str, Callable[..., nn.Module]] = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50}
# ViT-S is DeiT's, since torchvision has none.
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
    """Images (B, 3, H, W) -> logits (B, num_classes), with initial weights from torch's default generator.

    The unit's weights come from a separate generator, so the backbone starts the same with any unit.

    sync_batchnorm: synchronizes every BatchNorm over all processes.

    Raises:
        InputError: an unknown backbone or unit, or options that don't fit it.
    """
    has_unit = config.attention not in (None, "none")
    model = _backbone(config, has_unit)
    if sync_batchnorm:  # before attaching units: this replaces BatchNorms by modules without their hooks
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if has_unit:
        assert config.attention is not None
        attachment = attach(
            model, config.attention, at=_insertion_points(model, config), **(config.attention_kwargs or {})
        )
        if sync_batchnorm:
            nn.SyncBatchNorm.convert_sync_batchnorm(attachment.units)
    elif config.attention_kwargs or config.attention_stages is not None or config.attention_blocks is not None:
        raise InputError(
            "`model.attention` must be a unit for attention_kwargs, attention_stages or attention_blocks, got none"
        )
    return model


def _backbone(config: BackboneConfig, has_unit: bool) -> nn.Module:
    name, classes = config.backbone, config.num_classes
    if classes < 2 or config.sample_size < 8 or not 0 <= config.dropout < 1:
        raise InputError(
            "`model.num_classes` must be 2 or more, `sample_size` 8 or more and `dropout` from 0 to below 1, got "
            f"{classes}, {config.sample_size} and {config.dropout}"
        )
    if config.dropout and not name.startswith("cifar-wrn"):
        raise InputError(
            f"`model.dropout` must be 0 for backbone {name}, only cifar-wrn has dropout, got {config.dropout}"
        )
    # A norm before the unit if the branch has none; like the published networks, only with units.
    network = _cifar_network(config, Layers(config.norm, config.residual, branch_norm=has_unit))
    if network is not None:
        return network
    if config.norm != "batch" or not config.residual:
        raise InputError(
            f"`model.norm` and `residual` must be batch and true for backbone {name}, got {config.norm} and "
            f"{config.residual}"
        )
    if name == FEATURE_RESNET:
        return FeatureResNet(classes)
    if name in RESNETS:
        return RESNETS[name](weights=None, num_classes=classes)
    if name in VITS:
        if config.sample_size % 16:
            raise InputError(f"`model.sample_size` must be a multiple of 16 for {name}, got {config.sample_size}")
        return VisionTransformer(config.sample_size, 16, num_classes=classes, **VITS[name])
    raise InputError(f"`model.backbone` must be one of {ACCEPTED}, got {name!r}")


def _cifar_network(config: BackboneConfig, layers: Layers) -> nn.Module | None:
    """The network for a name that matches PATTERNS; None for other names."""
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


def _insertion_points(model: nn.Module, config: BackboneConfig) -> list[Position]:
    """The insertion points that carry the unit: the first blocks of the chosen stages."""
    stages = group_by_channels(insertion_points(model))
    chosen, first = config.attention_stages, config.attention_blocks
    if chosen is not None and (not chosen or not set(chosen) <= set(range(len(stages)))):
        raise InputError(f"`model.attention_stages` must be some of 0 to {len(stages) - 1}, or null, got {chosen}")
    if first is not None and first < 1:
        raise InputError(f"`model.attention_blocks` must be 1 or more, or null for all, got {first}")
    return [
        position
        for index, stage in enumerate(stages)
        if chosen is None or index in chosen
        for position in stage[:first]
    ]


WEIGHTS_FILE, CONFIG_FILE, TRAINING_FILE = "model.safetensors", "config.json", "training.json"


@dataclass(frozen=True)
class SavedClassifier:
    """A trained classifier and the normalization of its images."""

    model: nn.Module
    """Prepared images (B, 3, H, W) -> logits (B, num_classes); in evaluation mode, without weight gradients."""
    config: BackboneConfig
    mean: list[float]
    std: list[float]
    class_names: list[str] | None
    training: dict[str, Any] | None
    """Origin of the weights: run, step, recipe, data; None if unknown."""

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, H, W) -> normalized float32 images."""
        return normalized(images, self.mean, self.std)


def normalized(images: Tensor, mean: list[float], std: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 images (B, 3, H, W) -> (images / 255 - mean) / std per channel."""
    shift, scale = (sent(torch.tensor(values, dtype=dtype), images.device)[:, None, None] for values in (mean, std))
    return (images.to(dtype) / 255 - shift) / scale


def save_classifier(
    place: Path,
    weights: dict[str, Tensor],
    config: BackboneConfig,
    mean: list[float],
    std: list[float],
    class_names: tuple[str, ...] | None,
    training: dict[str, Any],
) -> None:
    """Writes a classifier folder atomically."""
    with atomic_dir(place) as temporary:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(tensors, temporary / WEIGHTS_FILE)
        names = None if class_names is None else list(class_names)
        about = {"model": config.model_dump(), "mean": mean, "std": std, "class_names": names}
        write_json(temporary / CONFIG_FILE, about)
        write_json(temporary / TRAINING_FILE, training)


def load_classifier(place: str | Path, device: str | torch.device = "cpu") -> SavedClassifier:
    """Loads a classifier folder, or the newest one of a `dia-diffusion classify` run.

    Raises InputError: there is none, or its files are truncated, corrupted or inconsistent.
    """
    folder = Path(place)
    if not (folder / CONFIG_FILE).is_file():
        newest = next(reversed(step_folders(folder / "classifiers").values()), None)
        if newest is None:
            raise InputError(f"{place} must be a classifier folder or a run of `dia-diffusion classify`, got neither")
        folder = newest
    try:
        about = read_json_object(folder / CONFIG_FILE)
        config = BackboneConfig.model_validate(about["model"])
        mean, std, class_names = about["mean"], about["std"], about["class_names"]
        if not all(fits(values, list[float]) and len(values) == 3 for values in (mean, std)):
            raise ValueError("mean and std of three channels")
        if not fits(class_names, list[str] | None) or len(class_names or ()) not in (0, config.num_classes):
            raise ValueError("class_names")
        training_file = folder / TRAINING_FILE
        training = read_json_object(training_file) if training_file.is_file() else None
    except (OSError, ValueError, KeyError):
        raise InputError(f"{folder / CONFIG_FILE} or {TRAINING_FILE} is truncated or corrupted") from None
    weights = folder / WEIGHTS_FILE
    stored = stored_shapes(weights)
    check_layers(about["model"], len(stored))
    check_size(lambda: build_classifier(config), stored)
    try:
        model, tensors = build_classifier(config), load_file(weights)
        if problem := unusable(tensors, model):
            raise InputError(f"{weights} has {problem}")
        model.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError):
        raise InputError(f"{weights} is missing, truncated, or of another network than {CONFIG_FILE} says") from None
    return SavedClassifier(model.eval().requires_grad_(False).to(device), config, mean, std, class_names, training)
