"""A kind of training: `Trainer` delegates the model, optimizer, images, loss and saved files to it."""

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
    """What checkpoints and saved models record about a set of images."""
    return {
        "name": images.name,
        "split": images.split,
        "count": len(images),
        "fingerprint": images.fingerprint,
        "class_names": images.class_names,
    }


class Draws(Protocol):
    """The random numbers of one step, for the images of the global batch or a slice of it."""

    def slice(self: "D", start: int, stop: int) -> "D":
        """The draws of images start..stop."""


D = TypeVar("D", bound=Draws)


class DrawAhead(Generic[D]):
    """The draws of images start..stop for each step; a thread can prepare the next step's during the current one.

    That pays off when a GPU computes or files are read. On a busy CPU it costs 1 to 3 % of a small model's step.
    """

    def __init__(self, draw: Callable[[int, int, int], D], start: int, stop: int):
        self.draw_step, self.start, self.stop = draw, start, stop
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.next: tuple[int, Future[D]] | None = None

    def draw(self, step: int, then_next: bool) -> D:
        """The draws of a step; then_next: whether to start preparing those of the next."""
        step_ahead, future = self.next or (None, None)
        draws = future.result() if future and step_ahead == step else self.draw_step(step, self.start, self.stop)
        if then_next:
            self.next = step + 1, self.thread.submit(self.draw_step, step + 1, self.start, self.stop)
        return draws


class Task(ABC):
    """A kind of training. The trainer calls these methods in this order, on all ranks.

    The constructor raises InputError for a recipe that would fail later.
    """

    experiment: Any
    """The recipe: the trainer reads output, seed, data.source, train, trackers, to_dict and MAY_CHANGE."""
    description: str
    """A few words about the model, for the first message."""
    optimizer_config: Any
    """The settings that `learning_rate` reads."""
    ema: EmaConfig | None = None
    """The moving average of the parameters; None keeps none."""
    reference_steps: float = 1.0
    """How many steps of the average one step counts as."""
    reads_files: bool = False
    """Whether drawing reads files, so that the next step's draws are prepared ahead on a CPU too."""
    compiling_pays_after: int | None = None
    """Steps on a CPU after which compiling pays off, so that train.compile "auto" compiles longer runs; None: never."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The model, with initial weights from torch's default generator."""

    @abstractmethod
    def build_optimizer(self, model: Any) -> torch.optim.Optimizer:
        """A fused optimizer, which can skip a step without waiting for the device, over `parameter_groups`."""

    def init_weights(self, model: Any) -> dict[str, Any] | None:
        """Loads other initial weights into a new run's model and returns their origin; None keeps its own."""
        return None

    def check_start(self, kept: dict[str, Any] | None) -> dict[str, Any] | None:
        """What `init_weights` returned when the resumed run was new, as stored in the checkpoint.

        Raises:
            InputError: the recipe requests other initial weights.
        """
        return kept

    @abstractmethod
    def open_images(self, accelerator: Accelerator, progress: Progress) -> ImageSet:
        """Opens the training images, and any other data; returns the former."""

    @abstractmethod
    def callbacks(self) -> Sequence[Callback]:
        """Callbacks that evaluate and save during training, before each checkpoint."""

    @abstractmethod
    def draw(self, step: int, start: int, stop: int) -> Draws:
        """The random numbers for images start..stop of a step's global batch: a function of the seed and the step.

        May be called in another thread.
        """

    @abstractmethod
    def loss(self, network: nn.Module, draws: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The mean loss () over the images of a slice of a step's draws."""
