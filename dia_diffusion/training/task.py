"""What a run trains: the part of a training that the engine (`training.loop`) leaves to a kind of model and loss."""

from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dia_diffusion.training.config import EmaConfig
from dia_diffusion.training.run_folder import Reporter, RunFolder


class Images(Protocol):
    """What the engine reads of a set of images."""

    @property
    def name(self) -> str: ...
    @property
    def split(self) -> str | None: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def class_names(self) -> tuple[str, ...] | None: ...
    def __len__(self) -> int: ...


def about_images(images: Images) -> dict[str, Any]:
    """What records say of a set of images."""
    return {
        "name": images.name,
        "split": images.split,
        "count": len(images),
        "fingerprint": images.fingerprint,
        "class_names": images.class_names,
    }


D = TypeVar("D", bound="Draws")


class Draws(Protocol):
    """What is random in one step, for the images of the global batch or a slice of it."""

    def slice(self: D, start: int, stop: int) -> D:
        """The draws of images start..stop of these."""


@dataclass(frozen=True)
class Moment:
    """A run after some step, when it is due to show itself."""

    step: int
    checkpoint: bool
    """Whether a checkpoint is written at this step."""
    last: bool
    """Whether it is the run's last step."""
    model: nn.Module
    weights: dict[str, Tensor] | None
    """The average of the model's parameters, where one is kept."""
    origin: dict[str, Any]
    """Where the weights come from: run, step, recipe, data."""
    folder: RunFolder
    accelerator: Accelerator
    reporter: Reporter


class DrawAhead:
    """The draws of images start..stop, step after step; a thread can make the next step's while this one runs.

    That pays where a GPU computes. On a CPU, whose cores are busy, handing over took 1 to 3 % of a small model's step.
    """

    def __init__(self, task: "Task", start: int, stop: int):
        self.task, self.start, self.stop = task, start, stop
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.next: tuple[int, Future[Draws]] | None = None

    def draw(self, step: int, then_next: bool) -> Draws:
        """The draws of a step; then_next: whether to start with those of the next."""
        step_ahead, future = self.next or (None, None)
        draws = future.result() if future and step_ahead == step else self.task.draw(step, self.start, self.stop)
        if then_next:
            self.next = step + 1, self.thread.submit(self.task.draw, step + 1, self.start, self.stop)
        return draws


class Task(ABC):
    """A kind of training. The engine calls the methods in about this order, on all processes alike."""

    experiment: Any
    """The recipe: its output, seed, data.source, train, trackers, to_dict and changed_keys are read by the engine."""
    ema: EmaConfig | None
    """The moving average that is kept of the parameters; None keeps none."""
    reference_steps: float = 1.0
    """The steps that a step counts as for the moving average."""
    compiling_pays_after: int | None = None
    """Steps on a CPU from which train.compile "auto" compiles the model; None: never."""

    def check(self) -> None:  # noqa: B027 - most kinds have nothing to check
        """Raises InputError for what would fail hours later."""

    @abstractmethod
    def about(self) -> str:
        """A few words on the model, for the first message."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The model, with first weights from torch's default generator."""

    @abstractmethod
    def parameter_groups(self, model: Any) -> list[dict[str, Any]]:
        """The optimizer's groups, each with its "peak_rate", together in the order of model.parameters()."""

    @abstractmethod
    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of these groups: a fused one, which can leave out a step without asking the device."""

    @abstractmethod
    def learning_rate(self, step: int, peak: float) -> float:
        """The rate of a step, counted from 0, in a group with this peak."""

    def first_weights(self, model: Any) -> dict[str, Any] | None:
        """Puts a new run's first weights into the model and says where from; None leaves it its own."""
        return None

    def same_start(self, kept: dict[str, Any] | None) -> dict[str, Any] | None:
        """What `first_weights` said when a run that now goes on was new; InputError where the recipe says otherwise."""
        return kept

    @abstractmethod
    def open_images(self, accelerator: Accelerator, reporter: Reporter) -> Images:
        """The images that are trained on, and whatever else is read."""

    @abstractmethod
    def draw(self, step: int, start: int, stop: int) -> Draws:
        """What is random for images start..stop of a step's global batch: a function of the seed and the step.

        May be called from another thread than the training's.
        """

    @abstractmethod
    def loss(self, network: nn.Module, draws: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The mean loss over the images of a slice of a step's draws."""

    @abstractmethod
    def shows_at(self, step: int) -> bool:
        """Whether a run shows itself after this many steps, besides where it writes a checkpoint."""

    @abstractmethod
    def show(self, moment: Moment) -> dict[str, float]:
        """Writes what there is to see of the run; returns numbers for metrics.jsonl. Leaves the model in training."""

    def diverged(self, folder: RunFolder, step: int) -> None:  # noqa: B027 - as above
        """Records, on the main process, that loss or gradient weren't finite at a step, counted from 1."""
