"""The features `cifar10`: a small residual network that tells the ten classes of CIFAR-10 apart."""

import torch

from dia_diffusion.evaluation.features.classifier import PACKAGED_WEIGHTS, Classifier, ClassifierExtractor
from dia_diffusion.models.feature_resnet import FeatureResNet


class Cifar10Classifier(FeatureResNet, Classifier):
    """That network for 32x32 colour images in [0, 1]; trained as `dia-diffusion classify --config cifar10_features`."""

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
