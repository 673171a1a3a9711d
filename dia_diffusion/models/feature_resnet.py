"""A small residual network whose last mean makes smooth features: the classifier behind the features `cifar10`."""

from typing import ClassVar

from torch import Tensor, nn


class FeatureResNet(nn.Module):
    """Images (B, 3, H, W) of about zero mean and unit variance -> logits (B, num_classes).

    Ten convolutions, 794 thousand parameters. Strides and means instead of maxima, for smooth features.
    """

    num_features: ClassVar[int] = 256

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _convolution(3, 32),
            _convolution(32, 64, stride=2),
            _Residual(64),
            _convolution(64, 128, stride=2),
            _Residual(128),
            _Residual(128),
            _convolution(128, self.num_features, kernel_size=1),
        )
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """The mean over the last map, (B, 256).

        Outside training an image and its mirror have the same features, the mean of both, which gets more
        of them right (0.8 % of CIFAR-10's test images) and keeps a distance from telling left from right.
        """
        features = self._mean_of_map(images)
        return features if self.training else (features + self._mean_of_map(images.flip(-1))) / 2

    def _mean_of_map(self, images: Tensor) -> Tensor:
        return self.trunk(images).mean((2, 3))  # of (B, 256, H / 4, W / 4)


class _Residual(nn.Module):
    branch_end = "branch.1.1"  # the last norm, where attach() puts a unit

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(_convolution(channels, channels), _convolution(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def _convolution(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))
