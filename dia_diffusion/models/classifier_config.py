"""The configuration of a classifier, which `dia_diffusion.models.classifiers` builds."""

from dia_diffusion.validation import Arguments, Attention, Float, Strict


class BackboneConfig(Strict):
    """A classifier's network and its attention unit."""

    backbone: str = "cifar-resnet164"
    """cifar-resnet83, cifar-resnet164, ..., cifar-resnet20-basic, cifar-wrn52-4, cifar-resnext101-8x32, torchvision's
    resnet18, resnet34, resnet50, vit_s_16, vit_b_16, or feature-resnet, the network of the features `cifar10`."""
    sample_size: int = 32
    """Height and width of the images."""
    num_classes: int = 10
    """Classes."""
    norm: str = "batch"
    """For the cifar- networks: "batch", or "none" for no norms."""
    residual: bool = True
    """For the cifar- networks: shortcuts around the blocks."""
    dropout: Float = 0.0
    """For cifar-wrn: dropout between a block's convolutions."""
    attention: Attention = "none"
    """The unit at the end of the blocks' residual branches, one per stage: none, dia-lstm, dia-lstm-light, se, ..."""
    attention_kwargs: Arguments | None = None
    """Further arguments of the unit, such as {reduction: 16} or {sharing: individual}."""
    attention_stages: list[int] | None = None
    """The stages that carry the unit, counted from 0; null is all."""
    attention_blocks: int | None = None
    """Number of blocks per stage that carry the unit, counted from the first; null is all."""
