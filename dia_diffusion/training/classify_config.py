"""A classification experiment: everything that decides which classifier is trained, with the recipe's keys."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dia_diffusion.errors import InputError
from dia_diffusion.models.classifier_config import BackboneConfig
from dia_diffusion.training.recipe_keys import differing_keys, flatten
from dia_diffusion.training.ssia_config import SsiaConfig


@dataclass
class LabelledDataConfig:
    """Where the images come from, and how they are shown to the network."""

    source: str = "cifar10"
    """Images in classes; see `dia-diffusion train --help` for what it may be."""
    split: str = "train"
    """The part of the source that is trained on, where it has parts."""
    test_source: str | None = None
    """Other images to test on; null is the source."""
    test_split: str | None = None
    """The part that is tested on; null is "test" of the source, or "train" (all) of test_source."""
    augmentation: Literal["pad-crop", "resized-crop", "none"] = "pad-crop"
    """"pad-crop": mirrored, and cropped from the image with a border of 4 pixels. "resized-crop": mirrored, and a
    random 8 to 100 % of the image resized; images are decoded as they are needed. "none": as they are."""
    border: Literal["black", "reflected"] = "black"
    """That of "pad-crop": black, or what is inside it mirrored."""
    cutout: int = 0
    """Height and width of a grey square that hides a part of each image (DeVries and Taylor 2017); 0 hides nothing."""
    mean: list[float] = field(default_factory=lambda: [0.4914, 0.4822, 0.4465])
    """Subtracted from the channels, of 0..1."""
    std: list[float] = field(default_factory=lambda: [0.2023, 0.1994, 0.2010])
    """The channels are divided by it."""


@dataclass
class ClassifyTrainConfig:
    """The loop."""

    batch_size: int = 128
    """Images an optimizer step, over all processes and accumulations together."""
    max_steps: int = 70_300
    """Optimizer steps."""
    accumulation: int = 1
    """Micro-batches a process adds up for one optimizer step; BatchNorm sees each alone."""
    mixed_precision: Literal["auto", "none", "bf16", "fp16"] = "auto"
    """Autocast precision; "auto" is bf16 where the device multiplies it natively, else none, which is float32.
    Weights, norms' statistics, attention state and loss stay float32."""
    compile: Literal["auto", "cuda-graphs"] | bool = "auto"
    """torch.compile; "auto" is on where there is a CUDA GPU;
    "cuda-graphs" also launches few graphs in place of many kernels, which is for small batches."""
    channels_last: bool = True
    """Maps in memory as (B, H, W, C), which convolutions are fastest in."""
    sync_batchnorm: bool = False
    """With several GPUs: BatchNorm over the images of all, not of each process alone."""
    label_smoothing: float = 0.0
    """The share of the target that is spread over all classes."""
    clip_grad_norm: float | None = None
    """Largest gradient norm; null doesn't clip."""
    max_skipped_steps: int = 10
    """So many steps in a row without a finite loss and gradient, which are skipped, end the run."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int = 1000
    """Steps between tests; 0 tests at the end alone."""
    checkpoint_every: int = 5000
    """Steps between checkpoints, each with a classifier folder."""
    keep_last: int = 3
    """Checkpoints and classifier folders kept."""


@dataclass
class ClassifyOptimizerConfig:
    """SGD or AdamW on every parameter."""

    name: Literal["sgd", "adamw"] = "sgd"
    """The optimizer."""
    learning_rate: float = 0.1
    """Rate after the warm-up."""
    momentum: float = 0.9
    """SGD's momentum."""
    nesterov: bool = False
    """SGD's momentum is Nesterov's."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's decay rates."""
    weight_decay: float = 1.0e-4
    """SGD's is part of the gradient, AdamW's apart from it."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from zero."""
    schedule: Literal["steps", "cosine", "linear", "constant"] = "steps"
    """After the warm-up: times gamma at each milestone, half a cosine or a line down to zero at max_steps, or as it
    is."""
    milestones: list[int] = field(default_factory=list)
    """Steps at which the schedule "steps" lowers the rate."""
    gamma: float = 0.1
    """By how much."""


@dataclass
class ClassifyExperiment:
    """A classification recipe with every default filled in."""

    output: str = "runs/unnamed-classifier"
    """The run folder."""
    seed: int = 0
    """Decides first weights, order of images, and augmentation."""
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    """Images."""
    model: BackboneConfig = field(default_factory=BackboneConfig)
    """Backbone and attention unit."""
    train: ClassifyTrainConfig = field(default_factory=ClassifyTrainConfig)
    """Loop."""
    optimizer: ClassifyOptimizerConfig = field(default_factory=ClassifyOptimizerConfig)
    """Optimizer."""
    ssia: SsiaConfig = field(default_factory=SsiaConfig)
    """Training-only loss."""
    trackers: list[str] = field(default_factory=list)
    """Accelerate trackers to log to besides metrics.jsonl: tensorboard, wandb, ..."""

    def __post_init__(self) -> None:
        self.model.attention = self.model.attention or "none"
        train, optimizer, data = self.train, self.optimizer, self.data
        for key, value, lowest in (
            ("seed", self.seed, 0),
            ("train.batch_size", train.batch_size, 1),
            ("train.max_steps", train.max_steps, 1),
            ("train.accumulation", train.accumulation, 1),
            ("train.log_every", train.log_every, 1),
            ("train.evaluate_every", train.evaluate_every, 0),
            ("train.checkpoint_every", train.checkpoint_every, 1),
            ("train.keep_last", train.keep_last, 1),
            ("train.max_skipped_steps", train.max_skipped_steps, 1),
            ("data.cutout", data.cutout, 0),
            ("optimizer.warmup_steps", optimizer.warmup_steps, 0),
            ("optimizer.weight_decay", optimizer.weight_decay, 0),
        ):
            if not value >= lowest:
                raise InputError(f"{key} is {value}; accepted: {lowest} or more")
        if self.seed >= 2**63:  # what JSON records hold
            raise InputError(f"seed must be below 2**63, got {self.seed}")
        for key, rate in (("optimizer.momentum", optimizer.momentum), ("train.label_smoothing", train.label_smoothing)):
            if not 0 <= rate < 1:
                raise InputError(f"{key} is {rate}; accepted: from 0 to below 1")
        for key, rate in (("optimizer.learning_rate", optimizer.learning_rate), ("optimizer.gamma", optimizer.gamma)):
            if not rate > 0:
                raise InputError(f"{key} is {rate}; accepted: above 0")
        if train.clip_grad_norm is not None and not train.clip_grad_norm > 0:
            raise InputError(f"train.clip_grad_norm is {train.clip_grad_norm}; accepted: above 0, or null for none")
        self.ssia.check()
        if not self.output:
            raise InputError("output is empty; accepted: the path of the run's folder")
        for key, place in (
            ("output", self.output),
            ("data.source", data.source),
            ("data.test_source", data.test_source),
        ):
            if place and "://" in place:  # which may carry a password, and would be kept in the run's records
                raise InputError(f"{key} is an address, {place}; accepted: a path, or a name")
        if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
            raise InputError(f"optimizer.betas are {optimizer.betas}; accepted: two numbers from 0 to below 1")
        if optimizer.nesterov and (optimizer.name != "sgd" or optimizer.momentum == 0):
            raise InputError("optimizer.nesterov is true; accepted: with sgd and a momentum above 0")
        if optimizer.milestones and (optimizer.schedule != "steps" or min(optimizer.milestones) < 1):
            raise InputError(
                f"optimizer.milestones are {optimizer.milestones} and the schedule {optimizer.schedule}; accepted: "
                "numbers of steps, with the schedule steps"
            )
        if data.border != "black" and data.augmentation != "pad-crop":
            raise InputError(f"data.border is {data.border}; accepted: with data.augmentation pad-crop")
        if len(data.mean) != 3 or len(data.std) != 3 or not all(value > 0 for value in data.std):
            raise InputError(
                f"data.mean is {data.mean}, data.std {data.std}; accepted: three numbers each, std above 0"
            )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, ready for YAML or JSON."""
        return asdict(self)

    def changed_keys(self, old: dict[str, Any]) -> list[str]:
        """What differs in the recipe of a run and may not."""
        may_change = MAY_CHANGE
        if flatten(old).get("optimizer.schedule") in ("cosine", "linear"):
            may_change = MAY_CHANGE - {"train.max_steps"}  # every step's rate depends on it
        return differing_keys(old, self.to_dict(), ClassifyExperiment().to_dict(), may_change)


# What may change when a run goes on; the training images are compared by their content, so their place may change too.
MAY_CHANGE = {
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
