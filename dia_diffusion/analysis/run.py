"""A run as the analyses see it: its networks at each step, and the images it was trained on as it feeds them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.errors import InputError
from dia_diffusion.io import step_folders
from dia_diffusion.models.classifiers import build_classifier, load_classifier, normalized
from dia_diffusion.pipelines.folder import read_training
from dia_diffusion.reading import read_yaml
from dia_diffusion.sampling.load import load_pipeline
from dia_diffusion.training.augmentation import ImageDraws, draw_images
from dia_diffusion.training.checkpoint import load_checkpoint, load_weights
from dia_diffusion.training.classification import Batches
from dia_diffusion.training.config import ClassifyExperiment
from dia_diffusion.training.diffusion import build_model, image_losses, training_batch
from dia_diffusion.training.randomness import WEIGHTS, StepDraws, derive, draw_step
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.run_folder import RunFolder
from dia_diffusion.training.ssia import without_heads


@dataclass(frozen=True)
class Coverage:
    """The images and times an analysis goes over."""

    num_images: int = 64
    """The first that `seed` draws from the images a run was trained on, flipped and noised as in training."""
    num_times: int = 16
    """Spread as training draws them; classifiers have none, and are run once an image."""
    seed: int = 0
    """Decides images and noise."""
    batch_size: int = 64
    """Images a forward pass; doesn't change what is measured."""
    progress: Callable[[int], None] = lambda images: None
    """Called with how many more images the network has seen."""


DEFAULT_COVERAGE = Coverage()


@dataclass(frozen=True)
class Batch:
    """Images at one time."""

    time: int
    """The index of the time among those an analysis goes over."""
    images: slice
    """Which of the drawn images."""
    losses: Callable[[nn.Module], Tensor]
    """Runs a network on them once: each image's part (B,) of the run's training loss."""


class TrainedRun(ABC):
    """A run's folder, opened for reading.

    Attributes:
        folder: its paths.
        name: the folder's own.
        device: where networks and batches go.
        images: what it was trained on; None until `open_runs` has read it.
    """

    def __init__(self, path: str | Path, device: torch.device | None = None):
        self.folder = RunFolder(path)
        self.name = self.folder.path.resolve().name
        self.device = device or torch.device("cpu")
        self._images: ImageSet | None = None

    @property
    def images(self) -> ImageSet:
        """What the run was trained on."""
        if self._images is None:
            raise ValueError(f"{self.name} was opened without its images; use open_runs")
        return self._images

    @images.setter
    def images(self, images: ImageSet) -> None:
        self._images = images

    unit: str
    """The unit's name; "none" without one."""
    unit_kwargs: dict[str, Any] | None
    """Its arguments, as in the recipe."""
    batch_size: int
    """Images a training step."""
    seed: int
    """The recipe's."""
    has_times: bool
    """Whether its network sees noise and a time."""
    kinds: dict[str, str]
    """"ema" and "raw" -> what the weights lie in, in a word."""

    @abstractmethod
    def places(self, weights: str) -> dict[int, Path]:
        """step -> where its averaged ("ema") or own ("raw") weights lie."""

    @abstractmethod
    def first_model(self) -> nn.Module:
        """The network before its first step, in evaluation mode; a run that started from others' began elsewhere."""

    @abstractmethod
    def _load(self, step: int, weights: str) -> nn.Module:
        """The network with a step's weights, in evaluation mode, on the device."""

    @abstractmethod
    def open_images(self, source: str | None, progress: Callable[[int, int], None] | None) -> ImageSet:
        """Reads what the run was trained on, from where it is now. Raises InputError: no such images."""

    @abstractmethod
    def trained_on(self) -> str | None:
        """The fingerprint of the images it was trained on; None where an older version didn't write it."""

    @abstractmethod
    def images_key(self, source: str | None) -> tuple[Any, ...]:
        """Runs with the same key have the same images."""

    @abstractmethod
    def draw(self, seed: int, number: int, count: int) -> Any:
        """What is random in the batch of that number, as training draws a step's; has `indices` (count,)."""

    @abstractmethod
    def batches(self, draws: Any, num_times: int, batch_size: int) -> Iterator[Batch]:
        """The drawn images in parts, each at all of so many spread times; classifiers have no times."""

    @abstractmethod
    def training_losses(self, model: nn.Module, draws: Any) -> Tensor:
        """Each drawn image's part (B,) of the loss, at the time that training would draw for it."""

    @property
    def starts_at_first_weights(self) -> bool:
        """Whether the run's history begins with `first_model`."""
        return True

    def model(self, step: int, weights: str = "ema") -> nn.Module:
        """The network with a step's averaged weights, or its own ("raw"), in evaluation mode; step 0: the first ones.

        Raises:
            InputError: no weights of that step, or damaged ones.
        """
        if step == 0:
            return self.first_model()
        self.choose_steps([step], weights)
        return self._load(step, weights)

    def choose_steps(self, asked: Sequence[int] | None, weights: str = "ema") -> list[int]:
        """The steps asked for, or all whose weights are kept.

        Raises:
            InputError: a step without weights, or none at all.
        """
        places = self.places(weights)
        kind = self.kinds[weights]
        if missing := [step for step in asked or () if step not in places]:
            accepted = ", ".join(map(str, places)) or "none"
            raise InputError(f"{self.folder.path} has no {kind} of step {missing[0]}; accepted: {accepted}")
        if not places:
            raise InputError(f"{self.folder.path} has no {kind}s")
        return list(places) if asked is None else sorted(set(asked))

    def with_first(self, asked: Sequence[int] | None, weights: str = "ema", *, in_training: bool = False) -> list[int]:
        """`choose_steps` with 0, the first weights, before them where all are meant, or where it is asked for.

        in_training: whether the network is looked at in training mode. In evaluation mode a BatchNorm that has seen
            nothing yet does nothing, so the first weights of a network with one are left out where all are meant.
        """
        if asked is None:
            first = self.starts_at_first_weights and (in_training or not has_batch_norm(self.first_model()))
        else:
            first = 0 in asked
        others = None if asked is None else [step for step in asked if step != 0]
        return [0] * first + (self.choose_steps(others, weights) if others is None or others else [])

    def draw_others(self, seed: int, count: int) -> Any:
        """The draws after `draw(seed, 0, count)`, of other images: what is fitted on those is measured on these.

        Raises:
            InputError: the run has too few images.
        """
        if 2 * count > len(self.images):
            raise InputError(
                f"{count} images and as many others are more than the {len(self.images):,} that {self.folder.path} "
                f"was trained on; accepted: {len(self.images) // 2} or fewer"
            )
        return self.draw(seed, 1, count)

    def classes(self, draws: Any) -> npt.NDArray[np.int64] | None:
        """The classes (B,) of the drawn images; None where the images have none."""
        return None if self.images.labels is None else np.asarray(self.images.labels[draws.indices])

    def num_times(self, asked: int) -> int:
        """How many times an analysis goes over, of so many asked for."""
        return asked if self.has_times else 1

    def require_unit(self) -> None:
        """Raises InputError for a run without attention unit."""
        if self.unit == "none":
            raise InputError(f"{self.folder.path} was trained without attention unit; accepted: runs with one")

    def described(self) -> dict[str, Any]:
        """For records: what the run is."""
        return {
            "run": self.name,
            "unit": self.unit,
            "unit_kwargs": self.unit_kwargs,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "images_fingerprint": self.images.fingerprint,
        }

    def measured(self, step: int) -> dict[str, int]:
        """For records: at what point of the training something was measured."""
        return {"step": step, "images_seen": step * self.batch_size}


def has_batch_norm(model: nn.Module) -> bool:
    """Whether the network normalises by statistics that training collects."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def spread(num_times: int) -> Tensor:
    """(T,) in (0, 1), as `uniform` of training's draws: the middles of equally likely parts of time."""
    return (torch.arange(num_times) + 0.5) / num_times


class DiffusionRun(TrainedRun):
    """A diffusion model's run folder, opened for reading.

    Raises:
        InputError: no pipelines in it yet.
    """

    has_times = True
    kinds = {"ema": "pipeline", "raw": "checkpoint"}  # noqa: RUF012 - the base class declares it

    def __init__(self, path: str | Path, device: torch.device | None = None):
        super().__init__(path, device)
        self.experiment = read_experiment(str(self.folder.config))
        self.process = self.experiment.noise_process()
        model, train = self.experiment.model, self.experiment.train
        self.unit, self.unit_kwargs = model.attention or "none", model.attention_kwargs
        self.batch_size, self.seed = train.batch_size, self.experiment.seed
        self.pipelines = step_folders(self.folder.pipelines)
        if not self.pipelines:
            raise InputError(f"{path} has no pipelines yet")

    @property
    def starts_at_first_weights(self) -> bool:
        return self.experiment.init_from is None

    def places(self, weights: str) -> dict[int, Path]:
        return self.pipelines if weights == "ema" else step_folders(self.folder.checkpoints)

    def first_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.experiment.seed, WEIGHTS))
            return build_model(self.experiment.model).eval().to(self.device)

    def _load(self, step: int, weights: str) -> nn.Module:
        if weights == "ema":
            return load_pipeline(self.folder.path, self.device, step=step).unet
        place, model = self.places(weights)[step], self.first_model()
        load_weights(model, without_heads(load_checkpoint(place).tensors["model"]), place)
        return model

    def images_key(self, source: str | None) -> tuple[Any, ...]:
        data, model = self.experiment.data, self.experiment.model
        return (source or data.source, data.split, model.sample_size, model.in_channels)

    def open_images(self, source: str | None, progress: Callable[[int, int], None] | None) -> ImageSet:
        place, split, size, channels = self.images_key(source)
        return open_images(place, split=split, size=size, channels=channels, progress=progress)

    def trained_on(self) -> str | None:
        training = read_training(list(self.pipelines.values())[-1])
        return training["data"].get("fingerprint") if training else None

    def draw(self, seed: int, number: int, count: int) -> StepDraws:
        return draw_step(seed, number, count, len(self.images), self.images.shape)

    def batch(self, draws: StepDraws) -> tuple[Tensor, Tensor | None]:
        """Images (B, C, H, W) in [-1, 1] and labels (B,), prepared as the run's training does."""
        return training_batch(self.images, self.experiment, draws, self.device, torch.float32)

    def batches(self, draws: StepDraws, num_times: int, batch_size: int) -> Iterator[Batch]:
        count = len(draws.indices)
        for start in range(0, count, batch_size):
            part = draws.slice(start, min(start + batch_size, count))
            images, labels = self.batch(part)
            for index, uniform in enumerate(spread(num_times)):
                at_time = replace(part, uniform=uniform.expand(len(images)))
                losses = partial(self._losses, images=images, draws=at_time, labels=labels)
                yield Batch(index, slice(start, start + len(images)), losses)

    def training_losses(self, model: nn.Module, draws: StepDraws) -> Tensor:
        images, labels = self.batch(draws)
        return self._losses(model, images, draws, labels)

    def _losses(self, model: nn.Module, images: Tensor, draws: StepDraws, labels: Tensor | None) -> Tensor:
        return image_losses(model, self.process, images, draws, labels)


class ClassifierRun(TrainedRun):
    """A classifier's run folder, opened for reading. It keeps no averaged weights: "ema" and "raw" are the same.

    Raises:
        InputError: no classifiers in it yet.
    """

    has_times = False
    kinds = {"ema": "classifier", "raw": "classifier"}  # noqa: RUF012 - the base class declares it

    def __init__(self, path: str | Path, device: torch.device | None = None):
        super().__init__(path, device)
        self.experiment = read_experiment(str(self.folder.config), kind=ClassifyExperiment)
        model, train = self.experiment.model, self.experiment.train
        self.unit, self.unit_kwargs = model.attention or "none", model.attention_kwargs
        self.batch_size, self.seed = train.batch_size, self.experiment.seed
        self.classifiers = step_folders(self.folder.classifiers)
        if not self.classifiers:
            raise InputError(f"{path} has no classifiers yet")

    def places(self, weights: str) -> dict[int, Path]:
        return self.classifiers

    def first_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.experiment.seed, WEIGHTS))
            return build_classifier(self.experiment.model).eval().to(self.device)

    def _load(self, step: int, weights: str) -> nn.Module:
        return load_classifier(self.classifiers[step], self.device).model

    def images_key(self, source: str | None) -> tuple[Any, ...]:
        data = self.experiment.data
        size = None if data.augmentation == "resized-crop" else self.experiment.model.sample_size
        return (source or data.source, data.split, size)

    def open_images(self, source: str | None, progress: Callable[[int, int], None] | None) -> ImageSet:
        place, split, size = self.images_key(source)
        return open_images(place, split=split, size=size, channels=3, decode=size is not None, progress=progress)

    def trained_on(self) -> str | None:
        training = load_classifier(list(self.classifiers.values())[-1]).training
        return training["data"].get("fingerprint") if training else None

    def draw(self, seed: int, number: int, count: int) -> ImageDraws:
        return draw_images(seed, number, count, len(self.images))

    def batches(self, draws: ImageDraws, num_times: int, batch_size: int) -> Iterator[Batch]:
        count = len(draws.indices)
        for start in range(0, count, batch_size):
            part = draws.slice(start, min(start + batch_size, count))
            yield Batch(0, slice(start, start + len(part.indices)), partial(self.training_losses, draws=part))

    def training_losses(self, model: nn.Module, draws: ImageDraws) -> Tensor:
        batches = Batches(self.images, self.experiment, lambda step, start, stop: draws)
        # The last step of a run is followed by none whose images would be decoded ahead.
        pixels, labels = batches.take(replace(draws, step=self.experiment.train.max_steps), self.device)
        images = normalized(pixels, self.experiment.data.mean, self.experiment.data.std)
        smoothing = self.experiment.train.label_smoothing
        return F.cross_entropy(model(images), labels, label_smoothing=smoothing, reduction="none")


def open_runs(
    paths: Sequence[str | Path],
    source: str | None = None,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[TrainedRun]:
    """Runs with their images, each set of images read once.

    source: where the images are now; None: where each run's recipe says.
    progress: called with (images read, of how many).

    Raises:
        InputError: no such run or images, or other images than a run was trained on.
    """
    runs = [open_run(path, device) for path in paths]
    opened: dict[tuple[Any, ...], ImageSet] = {}
    for run in runs:
        key = run.images_key(source)
        if key not in opened:
            opened[key] = run.open_images(source, progress)
        run.images = opened[key]
        if run.images.fingerprint != (run.trained_on() or run.images.fingerprint):
            raise InputError(f"{key[0]} has other images than {run.folder.path} was trained on; give those as --data")
    return runs


def open_run(path: str | Path, device: torch.device | None = None) -> TrainedRun:
    """A run of any kind, without its images.

    Raises:
        InputError: no run's folder, or one without weights.
    """
    config = RunFolder(path).config
    if not config.is_file():
        raise InputError(f"{path} is no run folder; accepted: what `dia-diffusion train` or classify writes")
    recipe = read_yaml(config, "recipe", "data, model, train")
    return DiffusionRun(path, device) if "noise" in recipe else ClassifierRun(path, device)
