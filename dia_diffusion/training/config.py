"""An experiment: everything that decides what is trained, as typed dataclasses with the recipe's keys."""

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dia_diffusion.errors import InputError
from dia_diffusion.training.recipe_keys import differing_keys, flatten
from dia_diffusion.training.ssia_config import SsiaConfig

if TYPE_CHECKING:  # the keys are told without waiting for torch
    from dia_diffusion.noise import NoiseProcess


MAX_REFERENCE = 1_000_000  # so that a beta below 1 stays below 1 at batch size 1


@dataclass
class DataConfig:
    """Where the images come from."""

    source: str = "digits"
    """A folder or zip of images or class folders, a CIFAR archive, a uint8 .npy or .npz file, a folder that a dataset's
    save_to_disk wrote, hf:NAME, or digits, cifar10, cifar100."""
    split: str = "train"
    """The part of the source that is trained on, where it has parts."""
    random_flip: bool = False
    """Mirror each image with probability one half."""
    label_dropout: float = 0.0
    """For class-conditional models: the share of labels replaced by the null label."""


@dataclass
class ModelConfig:
    """The arguments of dia_diffusion.UViT, or of AttachedModel around a network of diffusers."""

    backbone: Literal["uvit", "unet2d", "dit"] = "uvit"
    """U-ViT, or diffusers' UNet2DModel or DiTTransformer2DModel."""
    backbone_kwargs: dict[str, Any] | None = None
    """Arguments of diffusers' class, such as {block_out_channels: [64, 128]}."""
    sample_size: int = 32
    """Height and width the images are cropped and resized to."""
    patch_size: int = 2
    """Height and width of a patch."""
    in_channels: int = 3
    """3 for RGB, 1 for grey."""
    hidden_size: int = 512
    """Width of the tokens."""
    num_layers: int = 13
    """Transformer blocks, an odd number."""
    num_attention_heads: int = 8
    """Attention heads; must divide hidden_size."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over hidden_size."""
    qkv_bias: bool = False
    """A bias on queries, keys and values."""
    time_embed_mlp: bool = False
    """An MLP on the sinusoidal time embedding."""
    num_classes: int | None = None
    """Classes of a class-conditional model, the null label not counted."""
    final_conv: bool = True
    """A 3x3 convolution after the patches are put together."""
    long_skips: bool = True
    """Long skips from in blocks to out blocks."""
    residual_skips: bool = True
    """Attention and MLP are added to what they are given; without, each takes its place."""
    layer_norm: bool = True
    """LayerNorms in the blocks and before the decoder."""
    attention: str | None = "dia-lstm"
    """The unit before the MLPs: dia-lstm, dia-lstm-light, either with -identity (starts as the identity), lstm, se,
    eca, cbam, srm, spa, sem, spem, sge, none, or a control that sees no features: fixed-scale, block-scale,
    block-channels, block-channels-time."""
    attention_kwargs: dict[str, Any] | None = None
    """Further arguments of the unit, such as {reduction: 16} or {sharing: individual}."""
    attention_blocks: list[int] | None = None
    """The blocks that carry the unit, such as [0, 1], counted from 0 as they run; null is all."""
    attention_at: list[str] | None = None
    """Of a network of diffusers: names of the modules whose outputs the units recalibrate; null is after each resnet
    block, and before each MLP."""
    pool_tokens: Literal["all", "patch"] = "all"
    """What the unit pools over."""
    initialization: Literal["uvit", "xavier"] = "uvit"
    """"xavier" lets narrow networks find the positions of their patches early."""


# What a UViT alone has, and what a network of diffusers alone has.
OF_UVIT = [
    "patch_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "mlp_ratio",
    "qkv_bias",
    "time_embed_mlp",
    "final_conv",
    "long_skips",
    "residual_skips",
    "layer_norm",
    "attention_blocks",
    "pool_tokens",
    "initialization",
]
OF_OTHERS = ["backbone_kwargs", "attention_at"]


@dataclass
class NoiseConfig:
    """The noise process and what the network predicts."""

    schedule: str = "vp-continuous"
    """vp-continuous (the VP-SDE in continuous time), or ddpm-linear or cosine (1,000 discrete steps)."""
    prediction_type: str = "epsilon"
    """What the network predicts: epsilon, sample or v_prediction."""
    loss_weighting: str = "uniform"
    """Weight of the squared error over time: uniform or min-snr."""


@dataclass
class TrainConfig:
    """The loop."""

    batch_size: int = 128
    """Images an optimizer step, over all processes and accumulations together."""
    reference_batch_size: int | None = None
    """The batch size that beta2, ema.decay, ema.warmup and warmup_steps are given for: at another one they keep their
    half-lives and length in images, and the learning rate stays. null counts them in steps."""
    max_steps: int = 500_000
    """Optimizer steps."""
    accumulation: int = 1
    """Micro-batches a process adds up for one optimizer step."""
    mixed_precision: Literal["auto", "none", "bf16", "fp16"] = "auto"
    """Autocast precision; "auto" is bf16 where the device multiplies it natively, else none, which is float32.
    Weights, norms, attention state and loss stay float32."""
    compile: Literal["auto", "cuda-graphs"] | bool = "auto"
    """torch.compile; "auto" is on where there is a CUDA GPU, and on a CPU for UViTs of 5,000 steps or more;
    "cuda-graphs" also launches few graphs in place of many kernels, which is for small batches."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, more time."""
    clip_grad_norm: float | None = None
    """Largest gradient norm; null doesn't clip."""
    max_skipped_steps: int = 10
    """So many steps in a row without a finite loss and gradient, which are skipped, end the run."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 10_000
    """Steps between checkpoints, each with a pipeline folder."""
    sample_every: int = 10_000
    """Steps between sample grids; 0 draws none."""
    keep_last: int = 3
    """Checkpoints kept; pipeline folders all stay."""


@dataclass
class OptimizerConfig:
    """AdamW on every parameter."""

    learning_rate: float = 2.0e-4
    """Rate after the warm-up."""
    unit_learning_rate: float | None = None
    """The attention unit's own rate after the warm-up, on the same schedule; null is that of all parameters."""
    betas: tuple[float, float] = (0.99, 0.999)
    """AdamW's decay rates."""
    beta1_in_images: bool = False
    """Keep the half-life of the first beta in images too, where train.reference_batch_size is set."""
    weight_decay: float = 0.03
    """AdamW's weight decay."""
    warmup_steps: int = 2500
    """Steps over which the rate rises linearly from zero."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up; "cosine" falls to zero at max_steps."""


@dataclass
class EmaConfig:
    """The exponential moving average of the weights, which samples and pipelines use."""

    decay: float = 0.9999
    """Share of the old average kept at a step."""
    warmup: bool = False
    """Use min(decay, (1 + n) / (10 + n)) at step n: short runs forget their first weights sooner."""


@dataclass
class SamplesConfig:
    """The sample grids drawn along the way."""

    count: int = 64
    """Images a grid, from the seeds 0..count - 1."""
    sampler: str = "dpmsolver++"
    """A sampler's name, as for `dia-diffusion sample`."""
    steps: int = 50
    """Sampler steps."""
    guidance_scale: float = 1.0
    """Of classifier-free guidance, for class-conditional models; 1 is none."""


@dataclass
class Experiment:
    """A recipe with every default filled in."""

    output: str = "runs/unnamed"
    """The run folder."""
    seed: int = 0
    """Decides first weights, order of images, flips, times and noise."""
    init_from: str | None = None
    """A pipeline folder or a run whose weights a new run starts from."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Backbone and attention unit."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """Noise process."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Loop."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Moving average."""
    ssia: SsiaConfig = field(default_factory=SsiaConfig)
    """Training-only loss."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    """Grids."""
    trackers: list[str] = field(default_factory=list)
    """Accelerate trackers to log to besides metrics.jsonl: tensorboard, wandb, ..."""

    def __post_init__(self) -> None:
        self.model.attention = self.model.attention or "none"
        train, optimizer = self.train, self.optimizer
        for key, value, lowest in (
            ("seed", self.seed, 0),
            ("train.batch_size", train.batch_size, 1),
            ("train.max_steps", train.max_steps, 1),
            ("train.accumulation", train.accumulation, 1),
            ("train.log_every", train.log_every, 1),
            ("train.checkpoint_every", train.checkpoint_every, 1),
            ("train.sample_every", train.sample_every, 0),
            ("train.keep_last", train.keep_last, 1),
            ("train.max_skipped_steps", train.max_skipped_steps, 1),
            ("optimizer.warmup_steps", optimizer.warmup_steps, 0),
            ("samples.count", self.samples.count, 1),
            ("samples.steps", self.samples.steps, 1),
        ):
            if value < lowest:
                raise InputError(f"{key} is {value}; accepted: {lowest} or more")
        if self.seed >= 2**63:  # what JSON records hold
            raise InputError(f"seed must be below 2**63, got {self.seed}")
        for key, rate in (("ema.decay", self.ema.decay), ("data.label_dropout", self.data.label_dropout)):
            if not 0 <= rate < 1:
                raise InputError(f"{key} is {rate}; accepted: from 0 to below 1")
        if not self.output:
            raise InputError("output is empty; accepted: the path of the run's folder")
        for key, place in (("output", self.output), ("data.source", self.data.source), ("init_from", self.init_from)):
            if place and "://" in place:  # which may carry a password, and would be kept in the run's records
                raise InputError(f"{key} is an address, {place}; accepted: a path, or a name")
        if self.init_from == "":
            raise InputError("init_from is empty; accepted: a pipeline folder or a run, or null for none")
        if train.clip_grad_norm is not None and train.clip_grad_norm <= 0:
            raise InputError(f"train.clip_grad_norm is {train.clip_grad_norm}; accepted: above 0, or null for none")
        if not all(0 <= beta < 1 for beta in optimizer.betas):
            raise InputError(f"optimizer.betas are {list(optimizer.betas)}; accepted: two numbers from 0 to below 1")
        if optimizer.weight_decay < 0:
            raise InputError(f"optimizer.weight_decay is {optimizer.weight_decay}; accepted: 0 or more")
        if optimizer.learning_rate <= 0:
            raise InputError(f"optimizer.learning_rate is {optimizer.learning_rate}; accepted: above 0")
        reference = train.reference_batch_size
        if reference is not None and not 1 <= reference <= MAX_REFERENCE:
            raise InputError(
                f"`train.reference_batch_size` must be from 1 to {MAX_REFERENCE:,}, or null, got {reference}"
            )
        if optimizer.beta1_in_images and train.reference_batch_size is None:
            raise InputError("`optimizer.beta1_in_images` must be false without `train.reference_batch_size`, got true")
        self._check_backbone()
        if optimizer.unit_learning_rate is not None:
            self._check_unit_learning_rate(optimizer.unit_learning_rate)
        self.ssia.check()
        if self.ssia.weight and optimizer.unit_learning_rate is not None:
            raise InputError("ssia.weight is above 0, which optimizer.unit_learning_rate can't go with; leave out one")
        if self.data.label_dropout and self.model.num_classes is None:
            raise InputError("data.label_dropout needs a class-conditional model; set model.num_classes")
        if not 1 <= self.samples.guidance_scale < math.inf:
            raise InputError(
                f"samples.guidance_scale is {self.samples.guidance_scale}; accepted: 1, which is none, or more"
            )
        if self.samples.guidance_scale != 1 and not self.data.label_dropout:
            raise InputError(
                f"samples.guidance_scale {self.samples.guidance_scale} needs a null label that is trained; "
                "set model.num_classes and data.label_dropout, or leave it 1"
            )

    def _check_backbone(self) -> None:
        others = OF_OTHERS if self.model.backbone == "uvit" else OF_UVIT
        usual = ModelConfig()
        for key in others:
            if (value := getattr(self.model, key)) != getattr(usual, key):
                whose = "which backbone_kwargs replaces" if key in OF_UVIT else "which a UViT has not"
                raise InputError(f"model.{key} is {value!r}, {whose} for backbone {self.model.backbone}; leave it out")

    def _check_unit_learning_rate(self, rate: float) -> None:
        if not 0 < rate < math.inf:
            raise InputError(f"optimizer.unit_learning_rate is {rate}; accepted: above 0, or null")
        if self.model.attention == "none":
            raise InputError(f"optimizer.unit_learning_rate is {rate} and model.attention none; accepted: null")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, ready for YAML or JSON."""
        return {**asdict(self), "optimizer": {**asdict(self.optimizer), "betas": list(self.optimizer.betas)}}

    def changed_keys(self, old: dict[str, Any]) -> list[str]:
        """What differs in the recipe of a run and may not; see `changed_keys`."""
        return changed_keys(old, self.to_dict())

    def noise_process(self) -> "NoiseProcess":
        """The noise process the recipe names."""
        from dia_diffusion.noise import NoiseProcess

        return NoiseProcess(**asdict(self.noise))


# What may change when a run goes on: where it lies, what it reports and how it is computed, but not what is trained.
# The images and the weights it started from are compared by their content, so their place may change too.
MAY_CHANGE = {
    "output",
    "init_from",
    "trackers",
    "data.source",
    "train.max_steps",
    "train.accumulation",
    "train.compile",
    "train.gradient_checkpointing",
    "train.log_every",
    "train.checkpoint_every",
    "train.sample_every",
    "train.keep_last",
    "train.max_skipped_steps",
    "samples.count",
    "samples.sampler",
    "samples.steps",
    "samples.guidance_scale",
}


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys of two recipes, as to_dict gives them, that differ and may not: "train.batch_size: 32 -> 64"."""
    may_change = MAY_CHANGE
    if flatten(old).get("optimizer.schedule") == "cosine":
        may_change = MAY_CHANGE - {"train.max_steps"}  # every step's rate depends on it
    return differing_keys(old, new, Experiment().to_dict(), may_change)
