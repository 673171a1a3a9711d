"""Residual networks for 32x32 images: ResNet, Wide ResNet and ResNeXt in the sizes that arXiv 2210.16101 trains.

Shapes follow the published DIANet code: three stages, the second and third starting with stride 2, then the mean over
the last feature map. An attention unit goes at the end of a block's `branch`.
"""

from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from dia_diffusion.errors import InputError

NORMS = ("batch", "none")


class Block(nn.Module):
    """A residual block: relu(branch(x) + shortcut(x)). The shortcut is a projection if the shape changes."""

    branch_end = "branch"  # for attach()

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None):
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        return F.relu(out if self.shortcut is None else out + self.shortcut(x))


class PreActivationBlock(nn.Module):
    """Wide ResNet's block: x + branch(relu(norm(x))). If the shape changes, the shortcut projects relu(norm(x))."""

    branch_end = "branch"

    def __init__(self, first: nn.Module, branch: nn.Module, shortcut: nn.Module | None):
        super().__init__()
        self.first, self.branch, self.shortcut = first, branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        activated = self.first(x)
        out = self.branch(activated)
        if self.shortcut is None:
            return out
        return out + (x if isinstance(self.shortcut, nn.Identity) else self.shortcut(activated))


class Layers:
    """Makes the layers of a network.

    Args:
        norm: "batch", or "none": no norms and no biases in their place (the paper's VI-A2).
        residual: whether blocks have shortcuts.
        branch_norm: adds a norm at the end of branches that lack one, as the published code does before a unit.
    """

    def __init__(self, norm: str, residual: bool, branch_norm: bool):
        if norm not in NORMS:
            raise InputError(f"`norm` must be one of {', '.join(NORMS)}, got {norm!r}")
        self.has_norm, self.residual, self.branch_norm = norm == "batch", residual, branch_norm

    def convolution(self, n_in: int, n_out: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
        return nn.Conv2d(n_in, n_out, size, stride=stride, padding=size // 2, groups=groups, bias=False)

    def norm(self, channels: int) -> list[nn.Module]:
        return [nn.BatchNorm2d(channels)] if self.has_norm else []

    def normed(self, n_in: int, n_out: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        return [self.convolution(n_in, n_out, size, stride, groups), *self.norm(n_out)]

    def activation(self, channels: int | None = None) -> list[nn.Module]:
        """A norm of `channels`, if any, and a ReLU."""
        return [*([] if channels is None else self.norm(channels)), nn.ReLU(inplace=channels is None)]

    def shortcut(self, n_in: int, n_out: int, stride: int) -> nn.Module | None:
        if not self.residual:
            return None
        if n_in == n_out and stride == 1:
            return nn.Identity()
        return nn.Sequential(*self.normed(n_in, n_out, 1, stride))

    def basic(self, n_in: int, n_out: int, stride: int) -> nn.Module:
        """Two 3x3 convolutions."""
        first, second = self.normed(n_in, n_out, 3, stride), self.normed(n_out, n_out, 3)
        return Block(nn.Sequential(*first, *self.activation(), *second), self.shortcut(n_in, n_out, stride))

    def bottleneck(self, n_in: int, n_out: int, stride: int, width: int, groups: int = 1) -> nn.Module:
        """1x1, 3x3 of `width` channels in groups, 1x1."""
        branch = nn.Sequential(
            *self.normed(n_in, width, 1),
            *self.activation(),
            *self.normed(width, width, 3, stride, groups),
            *self.activation(),
            *self.normed(width, n_out, 1),
        )
        return Block(branch, self.shortcut(n_in, n_out, stride))

    def pre_activation(self, n_in: int, n_out: int, stride: int, dropout: float) -> nn.Module:
        """Two 3x3 convolutions, each after a norm and a ReLU."""
        branch = nn.Sequential(
            self.convolution(n_in, n_out, 3, stride),
            *self.activation(n_out),
            *([nn.Dropout(dropout)] if dropout else []),
            self.convolution(n_out, n_out, 3),
            *(self.norm(n_out) if self.branch_norm else []),
        )
        same = n_in == n_out and stride == 1
        shortcut = (nn.Identity() if same else self.convolution(n_in, n_out, 1, stride)) if self.residual else None
        return PreActivationBlock(nn.Sequential(*self.activation(n_in)), branch, shortcut)


BlockMaker = Callable[[int, int, int, int], nn.Module]
"""(channels in, channels out, stride, stage) -> a block."""


class CifarResNet(nn.Module):
    """Images (B, 3, H, W) -> logits (B, num_classes).

    Args:
        layers: makes convolutions and norms.
        block: makes a block.
        stem: output channels of the first convolution.
        widths: output channels per stage.
        blocks: blocks per stage.
        pre_activation: puts a norm and a ReLU before the head instead of after the first convolution.
        num_classes: classes.
    """

    def __init__(
        self,
        layers: Layers,
        block: BlockMaker,
        stem: int,
        widths: tuple[int, ...],
        blocks: int,
        pre_activation: bool,
        num_classes: int,
    ):
        super().__init__()
        self.stem: nn.Module = layers.convolution(3, stem, 3)
        if not pre_activation:
            self.stem = nn.Sequential(self.stem, *layers.activation(stem))
        self.stages = nn.ModuleList()
        n_in = stem
        for stage, n_out in enumerate(widths):
            strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
            channels = [n_in] + [n_out] * (blocks - 1)
            self.stages.append(
                nn.Sequential(*(block(c, n_out, s, stage) for c, s in zip(channels, strides, strict=True)))
            )
            n_in = n_out
        self.last = nn.Sequential(*(layers.activation(n_in) if pre_activation else []))
        self.head = nn.Linear(n_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.last(x).mean((2, 3)))


def cifar_resnet(depth: int, num_classes: int, layers: Layers, basic: bool = False) -> CifarResNet:
    """ResNet of depth 9 n + 2 with bottleneck blocks, or 6 n + 2 with basic ones (He et al., CVPR 2016, 4.2)."""
    blocks = blocks_per_stage(depth, 6 if basic else 9, 2)
    if basic:
        return CifarResNet(
            layers, lambda i, o, s, _: layers.basic(i, o, s), 16, (16, 32, 64), blocks, False, num_classes
        )
    return CifarResNet(
        layers, lambda i, o, s, _: layers.bottleneck(i, o, s, o // 4), 16, (64, 128, 256), blocks, False, num_classes
    )


def cifar_wrn(depth: int, widen: int, num_classes: int, layers: Layers, dropout: float = 0.0) -> CifarResNet:
    """Wide ResNet of depth 6 n + 4 (Zagoruyko and Komodakis, BMVC 2016)."""
    blocks, widths = blocks_per_stage(depth, 6, 4), (16 * widen, 32 * widen, 64 * widen)
    return CifarResNet(
        layers, lambda i, o, s, _: layers.pre_activation(i, o, s, dropout), 16, widths, blocks, True, num_classes
    )


def cifar_resnext(depth: int, cardinality: int, width: int, num_classes: int, layers: Layers) -> CifarResNet:
    """ResNeXt of depth 9 n + 2, with `cardinality` groups of `width` channels in the first stage.

    As in the published DIANet code: half the widths of Xie et al. (CVPR 2017), and a stem with 32 channels.
    """
    blocks, groups = blocks_per_stage(depth, 9, 2), cardinality

    def block(n_in: int, n_out: int, stride: int, stage: int) -> nn.Module:
        return layers.bottleneck(n_in, n_out, stride, cardinality * width * 2**stage, groups)

    return CifarResNet(layers, block, 32, (128, 256, 512), blocks, False, num_classes)


def blocks_per_stage(depth: int, layers_per_block: int, other_layers: int) -> int:
    """Blocks in each of the three stages. Raises InputError if that isn't a whole number."""
    blocks, rest = divmod(depth - other_layers, layers_per_block)
    if rest or blocks < 1:
        examples = ", ".join(str(layers_per_block * n + other_layers) for n in (1, 2, 3, 9, 18))
        raise InputError(f"depth must be {layers_per_block} n + {other_layers}, such as {examples}, got {depth}")
    return blocks


class FeatureResNet(nn.Module):
    """Images (B, 3, H, W) of about zero mean and unit variance -> logits (B, num_classes).

    Ten convolutions, 794 thousand parameters. Strides and mean pooling instead of max pooling, for smooth features.
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
        """The mean over the last feature map, (B, 256).

        In evaluation mode the features are averaged over the image and its mirror image, so both get the same ones.
        That classifies more of them correctly (0.8 % of CIFAR-10's test images) and makes distances blind to mirroring.
        """
        features = self._mean_of_map(images)
        return features if self.training else (features + self._mean_of_map(images.flip(-1))) / 2

    def _mean_of_map(self, images: Tensor) -> Tensor:
        return self.trunk(images).mean((2, 3))  # of (B, 256, H / 4, W / 4)


class _Residual(nn.Module):
    branch_end = "branch.1.1"  # the last norm, after which attach() puts a unit

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(_convolution(channels, channels), _convolution(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def _convolution(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))
