"""A kind of training: the model, optimizer, images, loss and saved files that `Trainer` leaves to it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dia_diffusion.data import ImageSet
from dia_diffusion.progress import Progress
from dia_diffusion.training.callbacks import Callback
from dia_diffusion.training.config import EmaConfig


def describe_images(images: ImageSet) -> dict[str, Any]:
    """What checkpoints and saved models record of a set of images."""
    return {
        "name": images.name,
        "split": images.split,
        "count": len(images),
        "fingerprint": images.fingerprint,
        "class_names": images.class_names,
    }


class Draws(Protocol):
    """What is random in one step, for the images of the global batch or a slice of it."""

    def slice(self: "D", start: int, stop: int) -> "D":
        """The draws of images start..stop of these."""


D = TypeVar("D", bound=Draws)


class DrawAhead(Generic[D]):
    """The draws of images start..stop, step after step; a thread can make the next step's while this one runs.

    That pays where a GPU computes or files are read. On a busy CPU, it costs 1 to 3 % of a small model's step.
    """

    def __init__(self, draw: Callable[[int, int, int], D], start: int, stop: int):
        self.draw_step, self.start, self.stop = draw, start, stop
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.next: tuple[int, Future[D]] | None = None

    def draw(self, step: int, then_next: bool) -> D:
        """The draws of a step; then_next: whether to start with those of the next."""
        step_ahead, future = self.next or (None, None)
        draws = future.result() if future and step_ahead == step else self.draw_step(step, self.start, self.stop)
        if then_next:
            self.next = step + 1, self.thread.submit(self.draw_step, step + 1, self.start, self.stop)
        return draws


class Task(ABC):
    """A kind of training. The trainer calls these methods in this order, on all ranks alike.

    Making one raises InputError for a recipe that would fail later.
    """

    experiment: Any
    """The recipe: the trainer reads output, seed, data.source, train, trackers, to_dict and MAY_CHANGE."""
    description: str
    """A few words on the model, for the first message."""
    optimizer_config: Any
    """What `learning_rate` reads."""
    ema: EmaConfig | None = None
    """The moving average that is kept of the parameters; None keeps none."""
    reference_steps: float = 1.0
    """How many steps of the average one step counts as."""
    reads_files: bool = False
    """Whether drawing reads files, so that the next step's draws are made ahead on a CPU too."""
    compiling_pays_after: int | None = None
    """Steps on a CPU from which train.compile "auto" compiles the model; None: never."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The model, with first weights from torch's default generator."""

    @abstractmethod
    def build_optimizer(self, model: Any) -> torch.optim.Optimizer:
        """A fused optimizer, which can skip a step without waiting for the device, over `parameter_groups`."""

    def init_weights(self, model: Any) -> dict[str, Any] | None:
        """Puts other first weights into a new run's model and says where they are from; None keeps its own."""
        return None

    def check_start(self, kept: dict[str, Any] | None) -> dict[str, Any] | None:
        """What `init_weights` returned when a resumed run was new, as the checkpoint kept it.

        Raises:
            InputError: the recipe asks for other first weights.
        """
        return kept

    @abstractmethod
    def open_images(self, accelerator: Accelerator, progress: Progress) -> ImageSet:
        """The images to train on, and whatever else is read."""

    @abstractmethod
    def callbacks(self) -> Sequence[Callback]:
        """What this kind evaluates and saves along the way, before each checkpoint."""

    @abstractmethod
    def draw(self, step: int, start: int, stop: int) -> Draws:
        """What is random for images start..stop of a step's global batch: a function of the seed and the step.

        May be called in another thread.
        """

    @abstractmethod
    def loss(self, network: nn.Module, draws: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The mean loss () over the images of a slice of a step's draws."""
