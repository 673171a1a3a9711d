"""A classifier of this project as a torch-fidelity extractor: the layer before its last gives the features."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch_fidelity import FeatureExtractorBase

from dia_diffusion.evaluation.features.extractor import fold_normalisations, load_weights

PACKAGED_WEIGHTS = Path(__file__).parent / "weights"


class Classifier(nn.Module, ABC):
    """Images (B, in_channels, size, size) in [0, 1] -> logits (B, num_classes), which `head` reads off features."""

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

    Images are resized to the classifier's own size, and their channels averaged where it takes grey ones.
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
        fold_normalisations(self.classifier)
        self.to(memory_format=torch.channels_last)  # half the time of convolutions on a CPU

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
