"""The features `digits`: a small classifier of 8x8 handwritten digits."""

import torch
from torch import nn

from dia_diffusion.evaluation.features.classifier import PACKAGED_WEIGHTS, Classifier, ClassifierExtractor


class DigitsClassifier(Classifier):
    """A small classifier of 8x8 grey images in [0, 1]; the layer before its last gives 64 features.

    GELU instead of ReLU and strides instead of maxima: a feature that is flat over half its range or jumps between
    pixels makes a poor ruler.
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
