"""Recipes of `classify` as typed models: everything that decides which classifier is trained."""

from typing import Literal

from pydantic import Field, model_validator

from dia_diffusion.errors import InputError
from dia_diffusion.models.classifier_config import BackboneConfig
from dia_diffusion.training.config import Betas, LoopConfig, Place, Recipe, SsiaConfig
from dia_diffusion.validation import Float, Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Strict


class LabelledDataConfig(Strict):
    """Where the images come from, and how they are shown to the network."""

    source: Place = "cifar10"
    """Images in classes; see `dia-diffusion train --help` for what it may be."""
    split: str = "train"
    """The part of the source that is trained on, where it has parts."""
    test_source: Place | None = None
    """Other images to test on; null is the source."""
    test_split: str | None = None
    """The part that is tested on; null is "test" of the source, or "train" (all) of test_source."""
    augmentation: Literal["pad-crop", "resized-crop", "none"] = "pad-crop"
    """"pad-crop": mirrored, and cropped from the image with a border of 4 pixels. "resized-crop": mirrored, and a
    random 8 to 100 % of the image resized; images are decoded as they are needed. "none": as they are."""
    border: Literal["black", "reflected"] = "black"
    """That of "pad-crop": black, or what is inside it mirrored."""
    cutout: NonNegative = 0
    """Height and width of a gray square that hides a part of each image (DeVries and Taylor 2017); 0 hides nothing."""
    mean: list[Float] = Field(default=[0.4914, 0.4822, 0.4465], min_length=3, max_length=3)
    """Subtracted from the channels, of 0..1."""
    std: list[PositiveFloat] = Field(default=[0.2023, 0.1994, 0.2010], min_length=3, max_length=3)
    """The channels are divided by it."""

    @model_validator(mode="after")
    def _check_together(self) -> "LabelledDataConfig":
        if self.border != "black" and self.augmentation != "pad-crop":
            raise InputError(f"`data.border` must be black without `data.augmentation` pad-crop, got {self.border}")
        return self


class ClassifyTrainConfig(LoopConfig):
    """The loop."""

    max_steps: Positive = 70_300
    """Optimizer steps."""
    channels_last: bool = True
    """Maps in memory as (B, H, W, C), which convolutions are fastest in."""
    sync_batchnorm: bool = False
    """With several GPUs: BatchNorm over the images of all, not of each process alone."""
    label_smoothing: Fraction = 0.0
    """The share of the target that is spread over all classes."""
    evaluate_every: NonNegative = 1000
    """Steps between tests; 0 tests at the end alone."""
    checkpoint_every: Positive = 5000
    """Steps between checkpoints, each with a classifier folder."""
    keep_last: Positive = 3
    """Checkpoints and classifier folders kept."""


class ClassifyOptimizerConfig(Strict):
    """SGD or AdamW on every parameter."""

    name: Literal["sgd", "adamw"] = "sgd"
    """The optimizer."""
    learning_rate: PositiveFloat = 0.1
    """Rate after the warm-up."""
    momentum: Fraction = 0.9
    """SGD's momentum."""
    nesterov: bool = False
    """SGD's momentum is Nesterov's."""
    betas: Betas = Field(default=[0.9, 0.999])
    """AdamW's decay rates."""
    weight_decay: NonNegativeFloat = 1.0e-4
    """SGD's is part of the gradient, AdamW's apart from it."""
    warmup_steps: NonNegative = 0
    """Steps over which the rate rises linearly from zero."""
    schedule: Literal["steps", "cosine", "linear", "constant"] = "steps"
    """After the warm-up: times gamma at each milestone, half a cosine or a line down to zero at max_steps, or
    constant."""
    milestones: list[Positive] = Field(default=[])
    """Steps at which the schedule "steps" lowers the rate."""
    gamma: PositiveFloat = 0.1
    """By how much."""

    @model_validator(mode="after")
    def _check_together(self) -> "ClassifyOptimizerConfig":
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise InputError("`optimizer.nesterov` must be false without sgd and a momentum above 0, got true")
        if self.milestones and self.schedule != "steps":
            raise InputError(f"`optimizer.milestones` must be [] without the schedule steps, got {self.milestones}")
        return self


class ClassifyExperiment(Recipe):
    """A recipe of `classify` with every default filled in."""

    MAY_CHANGE = frozenset(
        {
            "output",
            "trackers",
            "data.source",
            "data.test_source",
            "data.test_split",
            "train.max_steps",
            "train.compile",
            "train.log_every",
            "train.evaluate_every",
            "train.checkpoint_every",
            "train.keep_last",
            "train.max_skipped_steps",
        }
    )

    output: Place = "runs/unnamed-classifier"
    """The run folder."""
    data: LabelledDataConfig = LabelledDataConfig()
    """Images."""
    model: BackboneConfig = BackboneConfig()
    """Backbone and attention unit."""
    train: ClassifyTrainConfig = ClassifyTrainConfig()
    """Loop."""
    optimizer: ClassifyOptimizerConfig = ClassifyOptimizerConfig()
    """Optimizer."""
    ssia: SsiaConfig = SsiaConfig()
    """Training-only loss."""
