"""Recipes of `train` and `classify` as typed models: everything that determines a training.
`dia_diffusion.training.recipe` reads, changes and compares recipes. A field's docstring is its help."""

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from dia_diffusion.errors import InputError
from dia_diffusion.models.classifier_config import BackboneConfig
from dia_diffusion.validation import (
    Arguments,
    Attention,
    Float,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Strict,
    shown,
)

if TYPE_CHECKING:
    from dia_diffusion.noise import NoiseProcess


MAX_POWER_WIDTH = 0.288  # 1/sqrt(12) is the average that weights all steps equally
MAX_REFERENCE = 1_000_000  # so that a beta below 1 stays below 1 at batch size 1


def _refuse_address(value: str) -> str:
    if "://" in value:  # it may contain a password, and would be stored in the run's records
        raise ValueError("a path or a name")
    return value


Betas = Annotated[
    list[Fraction],
    BeforeValidator(lambda betas: list(betas) if isinstance(betas, tuple) else betas),
    Field(min_length=2, max_length=2),
]
Place = Annotated[str, Field(min_length=1), AfterValidator(_refuse_address)]


class SsiaConfig(Strict):
    """Experimental: a training-only loss with which higher blocks teach lower ones (arXiv 2206.07434)."""

    weight: NonNegativeFloat = 0.0
    """Weight of this loss, which is added to the recipe's own; 0 turns it off."""
    reduction: int = 4
    """Reduction ratio of its heads; must divide the widths of the blocks."""


class LoopConfig(Strict):
    """The settings of the training loop that `train` and `classify` share."""

    batch_size: Positive = 128
    """Images per optimizer step, over all processes and accumulations together."""
    accumulation: Positive = 1
    """Micro-batches that a process accumulates per optimizer step; BatchNorm sees each separately."""
    mixed_precision: Literal["auto", "none", "bf16", "fp16"] = "auto"
    """Autocast precision; "auto" is bf16 where the device multiplies it natively, else none, which is float32.
    Weights, norms, attention state and loss stay float32."""
    compile: Literal["auto", "cuda-graphs"] | bool = "auto"
    """torch.compile; "auto" is on with a CUDA GPU, and on a CPU for UViTs trained for 5,000 steps or more;
    "cuda-graphs" also launches few graphs instead of many kernels, for small batches."""
    clip_grad_norm: PositiveFloat | None = None
    """Largest gradient norm; null doesn't clip."""
    max_skipped_steps: Positive = 10
    """Steps without a finite loss and gradient are skipped; this many in a row end the run."""
    log_every: Positive = 50
    """Steps between lines of metrics.jsonl."""


class Recipe(Strict):
    """The keys that recipes of `train` and `classify` share."""

    COMMAND: ClassVar[str]
    """The command that trains it."""
    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"output", "trackers", "data.source"}) | {
        f"train.{key}"
        for key in ("max_steps", "compile", "log_every", "checkpoint_every", "keep_last", "max_skipped_steps")
    }
    """Keys that may change when a run resumes: where it is, what it reports and how it is computed, but not what is
    trained. Training images and initial weights are compared by content, so their location may change too."""

    output: Place = "runs/unnamed"
    """The run folder."""
    seed: NonNegative = 0
    """Determines initial weights, order of images, augmentation, times and noise."""
    trackers: list[str] = Field(default=[])
    """Accelerate trackers to log to in addition to metrics.jsonl: tensorboard, wandb, ..."""

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, ready for YAML or JSON."""
        return self.model_dump()


class DataConfig(Strict):
    """Where the images come from."""

    source: Place = "digits"
    """A folder or zip of images or class folders, a CIFAR archive, a uint8 .npy or .npz file, a folder that a dataset's
    save_to_disk wrote, hf:NAME, or digits, cifar10, cifar100."""
    split: str = "train"
    """The part of the source that is trained on, where it has parts."""
    random_flip: bool = False
    """Mirror each image with probability one half."""
    label_dropout: Fraction = 0.0
    """For class-conditional models: the fraction of labels replaced by the null label."""


class ModelConfig(Strict):
    """The backbone and its attention unit. Further keys are arguments of the backbone's class."""

    model_config = ConfigDict(extra="allow")  # recipe.resolve checks them against the class's signature

    backbone: str = "uvit"
    """uvit (U-ViT), or unet2d or dit (diffusers' UNet2DModel and DiTTransformer2DModel)."""
    sample_size: int = 32
    """Height and width to which images are cropped and resized."""
    in_channels: int = 3
    """3 for RGB, 1 for gray."""
    num_classes: int | None = None
    """Classes of a class-conditional model, not counting the null label."""
    attention: Attention = "dia-lstm"
    """The unit before the MLPs: dia-lstm, dia-lstm-light, either with -identity (starts as the identity), lstm, se,
    eca, cbam, srm, spa, sem, spem, sge, none, or a control that sees no features: fixed-scale, block-scale,
    block-channels, block-channels-time."""
    attention_kwargs: Arguments | None = None
    """Further arguments of the unit, such as {reduction: 16} or {sharing: individual}."""


class NoiseConfig(Strict):
    """The noise process and what the network predicts."""

    schedule: str = "vp-continuous"
    """vp-continuous (the VP-SDE in continuous time), ddpm-linear or cosine (1,000 discrete steps), or flow (rectified
    flow)."""
    prediction_type: str = "epsilon"
    """What the network predicts: epsilon, sample or v_prediction; for the flow, velocity or sample."""
    loss_weighting: str = "uniform"
    """Weight of the squared error over time: uniform or min-snr. For the flow, this is the velocity's error."""
    times: str = "uniform"
    """Distribution of the training times: uniform, logit-normal, or log-normal (EDM's, of sigma / alpha)."""
    times_kwargs: Arguments | None = None
    """Mean and deviation of the normal distribution: logit-normal's defaults are {mean: 0, deviation: 1}, log-normal's
    {mean: -1.2, deviation: 1.2}; uniform has none."""
    shift: PositiveFloat = 1.0
    """Multiplies sigma / alpha at the times that are drawn; use more than 1 for larger images. Samplers of the flow
    apply it too."""


class TrainConfig(LoopConfig):
    """The loop."""

    reference_batch_size: Annotated[int, Field(ge=1, le=MAX_REFERENCE)] | None = None
    """The batch size for which beta2, ema.decay, ema.warmup and warmup_steps are given: at another one they keep their
    half-lives and lengths in images, and the learning rate stays the same. null counts them in steps."""
    max_steps: Positive = 500_000
    """Optimizer steps."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, more time."""
    checkpoint_every: Positive = 10_000
    """Steps between checkpoints, each with a pipeline folder."""
    sample_every: NonNegative = 10_000
    """Steps between sample grids; 0 draws none."""
    keep_last: Positive = 3
    """Checkpoints kept; all pipeline folders are kept."""


class OptimizerConfig(Strict):
    """AdamW on every parameter, or Muon on the hidden matrices."""

    name: Literal["adamw", "muon"] = "adamw"
    """The optimizer; "muon" is Muon for the linear layers in the blocks and AdamW for all other parameters."""
    learning_rate: PositiveFloat = 2.0e-4
    """Rate after the warm-up."""
    muon_learning_rate: PositiveFloat | None = None
    """Muon's rate after the warm-up, on the same schedule; null is learning_rate."""
    unit_learning_rate: PositiveFloat | None = None
    """The attention unit's rate after the warm-up, on the same schedule; null is the rate of the other parameters."""
    betas: Betas = Field(default=[0.99, 0.999])
    """AdamW's decay rates."""
    muon_momentum: Fraction = 0.95
    """Muon's decay rate."""
    beta1_in_images: bool = False
    """With train.reference_batch_size, also keep the half-lives of the first beta and of Muon's momentum in images."""
    weight_decay: NonNegativeFloat = 0.03
    """AdamW's and Muon's weight decay."""
    warmup_steps: NonNegative = 2500
    """Steps over which the rate rises linearly from zero."""
    schedule: Literal["constant", "cosine", "warmup-stable-decay"] = "constant"
    """After the warm-up; "cosine" decays to zero at max_steps, "warmup-stable-decay" is constant before its decay."""
    decay_fraction: Annotated[Fraction, Field(gt=0)] = 0.2
    """The last fraction of max_steps, in which "warmup-stable-decay" decays linearly to zero."""


class EmaConfig(Strict):
    """The exponential moving average of the weights, which samples and pipelines use, and further averages."""

    decay: Fraction = 0.9999
    """Fraction of the old average kept at each step."""
    warmup: bool = False
    """Use min(decay, (1 + n) / (10 + n)) at step n, so that short runs forget their initial weights sooner."""
    further_decays: list[Fraction] = Field(default=[])
    """Decays of further averages, kept in checkpoints; `dia-diffusion ema --decay` makes pipelines of them."""
    power_widths: list[Annotated[Float, Field(gt=0, le=MAX_POWER_WIDTH)]] = Field(default=[])
    """Relative widths of power-function averages (EDM2), such as [0.05, 0.1]; from their snapshots `dia-diffusion ema
    --width` makes an average of any other width."""
    snapshot_every: NonNegative = 0
    """Steps between snapshots of the power-function averages; all are kept."""

    @model_validator(mode="after")
    def _check_together(self) -> "EmaConfig":
        for key in ("further_decays", "power_widths"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise InputError(f"`ema.{key}` must be different numbers, got {values}")
        if self.power_widths and not self.snapshot_every:
            raise InputError("`ema.snapshot_every` must be 1 or more with `ema.power_widths`, got 0")
        if self.snapshot_every and not self.power_widths:
            raise InputError(f"`ema.snapshot_every` must be 0 without `ema.power_widths`, got {self.snapshot_every}")
        return self


class SamplesConfig(Strict):
    """The sample grids drawn during training."""

    count: Positive = 64
    """Images per grid, from the seeds 0..count - 1."""
    sampler: str = "dpmsolver++"
    """A sampler's name, as for `dia-diffusion sample`."""
    steps: Positive = 50
    """Sampler steps."""
    guidance_scale: Annotated[Float, Field(ge=1)] = 1.0
    """Scale of classifier-free guidance, for class-conditional models; 1 is none."""
    guidance_interval: list[Float] | None = None
    """Two noise levels: guidance applies where low < sigma / alpha <= high; null is everywhere."""


class Experiment(Recipe):
    """A recipe of `train` with every default filled in."""

    COMMAND = "train"
    MAY_CHANGE = Recipe.MAY_CHANGE | {
        "init_from",
        *(f"train.{key}" for key in ("accumulation", "gradient_checkpointing", "sample_every")),
        *(f"samples.{key}" for key in SamplesConfig.model_fields),
    }

    init_from: Place | None = None
    """A pipeline folder or a run whose weights a new run starts from."""
    data: DataConfig = DataConfig()
    """Images."""
    model: ModelConfig = ModelConfig()
    """Backbone and attention unit."""
    noise: NoiseConfig = NoiseConfig()
    """Noise process."""
    train: TrainConfig = TrainConfig()
    """Loop."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer."""
    ema: EmaConfig = EmaConfig()
    """Moving average."""
    ssia: SsiaConfig = SsiaConfig()
    """Training-only loss."""
    samples: SamplesConfig = SamplesConfig()
    """Grids."""

    @model_validator(mode="after")
    def _check_together(self) -> "Experiment":
        optimizer, scale = self.optimizer, self.samples.guidance_scale
        if optimizer.beta1_in_images and self.train.reference_batch_size is None:
            raise InputError("`optimizer.beta1_in_images` must be false without `train.reference_batch_size`, got true")
        if optimizer.name != "muon" and (rate := optimizer.muon_learning_rate) is not None:
            raise InputError(f"`optimizer.muon_learning_rate` must be null without `optimizer.name` muon, got {rate}")
        if optimizer.schedule == "warmup-stable-decay":
            in_reference_steps = self.train.batch_size / (self.train.reference_batch_size or self.train.batch_size)
            stable = (1 - optimizer.decay_fraction) * self.train.max_steps
            most = math.floor(stable * in_reference_steps + 1e-6)  # 0.1 * 1000 can be slightly below 100
            if optimizer.warmup_steps > most:
                raise InputError(
                    f"`optimizer.warmup_steps` must be at most {most:,}, where `optimizer.decay_fraction` begins, "
                    f"got {optimizer.warmup_steps:,}"
                )
        if self.ema.snapshot_every > self.train.max_steps:
            raise InputError(
                f"`ema.snapshot_every` must be at most `train.max_steps` {self.train.max_steps:,}, "
                f"got {self.ema.snapshot_every:,}"
            )
        if (rate := optimizer.unit_learning_rate) is not None:
            if self.model.attention == "none":
                raise InputError(f"`optimizer.unit_learning_rate` must be null with `model.attention` none, got {rate}")
            if self.ssia.weight:
                raise InputError(f"`optimizer.unit_learning_rate` must be null with `ssia.weight` above 0, got {rate}")
        if (dropout := self.data.label_dropout) and self.model.num_classes is None:
            raise InputError(f"`data.label_dropout` must be 0 without `model.num_classes`, got {shown(dropout)}")
        if scale != 1 and not dropout:
            raise InputError(
                f"`samples.guidance_scale` must be 1 without `model.num_classes` and `data.label_dropout`, got {scale}"
            )
        return self

    def noise_process(self) -> "NoiseProcess":
        """The noise process the recipe names. Raises InputError for names that aren't registered."""
        from dia_diffusion.noise import NoiseProcess

        return NoiseProcess(**self.noise.model_dump())


class LabelledDataConfig(Strict):
    """Where the images come from, and how they are augmented and normalized."""

    source: Place = "cifar10"
    """Images in classes; see `dia-diffusion train --help` for the possible sources."""
    split: str = "train"
    """The part of the source that is trained on, where it has parts."""
    test_source: Place | None = None
    """Other images to test on; null is the source."""
    test_split: str | None = None
    """The split that is tested on; null is "test" of the source, or "train" (all) of test_source."""
    augmentation: Literal["pad-crop", "resized-crop", "none"] = "pad-crop"
    """"pad-crop": random mirroring, and a random crop after adding a border of 4 pixels. "resized-crop": random
    mirroring, and a random 8 to 100 % of the image, resized; images are decoded as needed. "none": unchanged."""
    border: Literal["black", "reflected"] = "black"
    """The border of "pad-crop": black, or a reflection of the image."""
    cutout: NonNegative = 0
    """Height and width of a gray square that hides a part of each image (DeVries and Taylor 2017); 0 hides nothing."""
    mean: list[Float] = Field(default=[0.4914, 0.4822, 0.4465], min_length=3, max_length=3)
    """Subtracted from the channels, which range from 0 to 1."""
    std: list[PositiveFloat] = Field(default=[0.2023, 0.1994, 0.2010], min_length=3, max_length=3)
    """The channels are then divided by it."""

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
    """Keep feature maps as (B, H, W, C) in memory, which is fastest for convolutions."""
    sync_batchnorm: bool = False
    """With several GPUs: compute BatchNorm over the images of all processes, not of each separately."""
    label_smoothing: Fraction = 0.0
    """The fraction of the target that is spread over all classes."""
    evaluate_every: NonNegative = 1000
    """Steps between tests; 0 tests only at the end."""
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
    """Use Nesterov momentum in SGD."""
    betas: Betas = Field(default=[0.9, 0.999])
    """AdamW's decay rates."""
    weight_decay: NonNegativeFloat = 1.0e-4
    """Weight decay: added to the gradient in SGD, decoupled in AdamW."""
    warmup_steps: NonNegative = 0
    """Steps over which the rate rises linearly from zero."""
    schedule: Literal["steps", "cosine", "linear", "constant"] = "steps"
    """After the warm-up: "steps" multiplies the rate by gamma at each milestone; "cosine" (half a period) and "linear"
    decay to zero at max_steps."""
    milestones: list[Positive] = Field(default=[])
    """Steps at which the schedule "steps" lowers the rate."""
    gamma: PositiveFloat = 0.1
    """The factor at each milestone."""

    @model_validator(mode="after")
    def _check_together(self) -> "ClassifyOptimizerConfig":
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise InputError("`optimizer.nesterov` must be false without sgd and a momentum above 0, got true")
        if self.milestones and self.schedule != "steps":
            raise InputError(f"`optimizer.milestones` must be [] without the schedule steps, got {self.milestones}")
        return self


class ClassifyExperiment(Recipe):
    """A recipe of `classify` with every default filled in."""

    COMMAND = "classify"
    MAY_CHANGE = Recipe.MAY_CHANGE | {"data.test_source", "data.test_split", "train.evaluate_every"}

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
