"""The features `digits` and `cifar10`: classifiers of this project whose weights are in the package."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch_fidelity import FeatureExtractorBase, register_feature_extractor

from dia_diffusion.evaluation.features.extractor import (
    BuildFeatures,
    DownloadProgress,
    fold_batch_norms,
    load_weights,
)
from dia_diffusion.io import sha256_of_file
from dia_diffusion.models.cifar_resnet import FeatureResNet

PACKAGED_WEIGHTS = Path(__file__).parent / "weights"


class Classifier(nn.Module, ABC):
    """Images (B, in_channels, size, size) in [0, 1] -> logits (B, num_classes), computed from features by `head`."""

    in_channels: ClassVar[int]
    image_size: ClassVar[int]
    num_features: ClassVar[int]
    num_classes: ClassVar[int] = 10
    head: nn.Linear

    @abstractmethod
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, num_features), for images as above."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


class ClassifierExtractor(FeatureExtractorBase):
    """A classifier's features and "logits", for uint8 images (B, 3, H, W) of any size.

    Images are resized to the classifier's own size, and their channels are averaged if it takes gray images.
    `feature_extractor_weights_path` replaces the packaged weights.
    """

    network: ClassVar[type[Classifier]]
    weights: ClassVar[Path]

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | Path | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(name, features_list)
        self.classifier = load_weights(self.network(), feature_extractor_weights_path or self.weights).eval()
        fold_batch_norms(self.classifier)
        self.to(memory_format=torch.channels_last)  # halves the time of convolutions on a CPU

    @classmethod
    def get_provided_features_list(cls) -> tuple[str, ...]:
        return (str(cls.network.num_features), "logits")

    @classmethod
    def get_default_feature_layer_for_metric(cls, metric: str) -> str:
        return "logits" if metric == "isc" else str(cls.network.num_features)

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pixels = images.float() / 255  # (B, 3, H, W)
        if self.network.in_channels == 1:
            pixels = pixels.mean(1, keepdim=True)
        size = (self.network.image_size, self.network.image_size)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        features = self.classifier.features(pixels.contiguous(memory_format=torch.channels_last))
        layers = dict(zip(self.get_provided_features_list(), (features, self.classifier.head(features)), strict=True))
        return tuple(layers[name] for name in self.features_list)


class DigitsClassifier(Classifier):
    """A small classifier of 8x8 gray images in [0, 1]; the layer before the last gives 64 features.

    It has GELU instead of ReLU and strides instead of max pooling, since a feature that is flat over half its range or
    jumps between pixels is a poor measure of distance.
    """

    in_channels = 1
    image_size = 8
    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 64),
            nn.GELU(),
        )
        self.head = nn.Linear(64, 10)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 1, 8, 8) in [0, 1] -> (B, 64)."""
        return self.trunk(2 * images - 1)


class DigitsExtractor(ClassifierExtractor):
    """The classifier of digits with the layers "64" and "logits"."""

    network = DigitsClassifier
    weights = PACKAGED_WEIGHTS / "digits.safetensors"


class Cifar10Classifier(FeatureResNet, Classifier):
    """FeatureResNet for 32x32 color images in [0, 1]; trained by `dia-diffusion classify --config cifar10_features`."""

    in_channels = 3
    image_size = 32
    num_features = FeatureResNet.num_features

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, 32, 32) in [0, 1] -> (B, 256), the same for an image and its mirror; see FeatureResNet."""
        return super().features(4 * images - 2)  # the recipe's mean of 0.5 and deviation of 0.25


class Cifar10Extractor(ClassifierExtractor):
    """The classifier of CIFAR-10 with the layers "256" and "logits"."""

    network = Cifar10Classifier
    weights = PACKAGED_WEIGHTS / "cifar10.safetensors"


PACKAGED: dict[str, type[ClassifierExtractor]] = {"digits": DigitsExtractor, "cifar10": Cifar10Extractor}
"""Features that need no download, by name."""

for _name, _extractor in PACKAGED.items():
    register_feature_extractor(_name, _extractor)


def build_packaged(name: str) -> BuildFeatures:
    """The row of FEATURES for an extractor of PACKAGED."""

    def build(weights: str | Path | None, progress: DownloadProgress | None) -> tuple[str, FeatureExtractorBase, str]:
        extractor = PACKAGED[name]
        file = Path(weights or extractor.weights)
        layers = [extractor.get_default_feature_layer_for_metric(metric) for metric in ("fid", "isc")]
        module = extractor(name, layers, feature_extractor_weights_path=file)
        return name, module, sha256_of_file(file)

    return build
