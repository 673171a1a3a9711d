"""Training runs as the analyses see them: the network at each step, images as training feeds them, and the loss.

Runs of `dia-diffusion train` and `classify` have the same methods; the two subclasses implement the differences.
"""

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
from dia_diffusion.training import randomness
from dia_diffusion.training.augmentation import ImageDraws, draw_images
from dia_diffusion.training.checkpoint import load_checkpoint, load_weights
from dia_diffusion.training.classification import labelled_batch, with_files
from dia_diffusion.training.config import ClassifyExperiment
from dia_diffusion.training.diffusion import build_model, dropping_blocks, image_losses, training_batch
from dia_diffusion.training.randomness import StepDraws, draw_step
from dia_diffusion.training.recipe import command_of, read_experiment
from dia_diffusion.training.run_folder import RunFolder
from dia_diffusion.training.ssia import without_heads


@dataclass(frozen=True)
class Coverage:
    """The images and times that an analysis covers."""

    num_images: int = 64
    """How many of the run's training images to use: the first that `seed` draws, flipped and noised as in training."""
    num_times: int = 16
    """Distributed as in training. A classifier has no times: it runs once per image."""
    seed: int = 0
    """Seed of images and noise."""
    batch_size: int = 64
    """Images per forward pass; doesn't change what is measured."""
    progress: Callable[[int], None] = lambda images: None
    """Called with the number of images processed since the last call."""
    num_samples: int = 20_000
    """Samples of the attention maps to fit a random forest on (importance)."""

    def work(self, run: "TrainedRun") -> int:
        """The number of images that the network processes in one pass over all images and times."""
        return self.num_images * run.num_times(self.num_times)


DEFAULT_COVERAGE = Coverage()


@dataclass(frozen=True)
class GradientBatches:
    """The batches that an analysis of gradients covers."""

    num_batches: int
    batch_size: int | None = None
    """Images per batch; None: the run's batch size."""
    seed: int = 0
    """Seed of images, times and noise."""
    progress: Callable[[int], None] = lambda batches: None
    """Called with the number of batches finished since the last call."""

    def size(self, run: "TrainedRun") -> int:
        """Images per batch."""
        return self.batch_size or run.batch_size

    def work(self, run: "TrainedRun") -> int:
        """The number of batches."""
        return self.num_batches


@dataclass(frozen=True)
class Batch:
    """Images at one time."""

    time: int
    """The index of the time in the coverage."""
    images: slice
    """Which of the drawn images."""
    classes: npt.NDArray[np.int64] | None
    """(B,), the images' classes; None if they have none."""
    losses: Callable[[nn.Module], Tensor]
    """Runs a network on the images once and returns each image's part (B,) of the run's training loss."""


class TrainedRun(ABC):
    """A run's folder, opened for reading; networks and batches go to the device.

    experiment: its recipe.
    saved: "ema" or "raw" -> what these weights are saved as, such as a checkpoint, and the folder of all of them.

    Raises:
        InputError: the run has no averaged weights yet.
    """

    has_times: bool
    """Whether the network sees noise and a time."""
    starts_at_first_weights = True
    """Whether the run started from `first_model`."""
    images: ImageSet
    """The training images; `open_runs` sets them."""

    def __init__(
        self, path: str | Path, device: torch.device | None, experiment: Any, saved: dict[str, tuple[str, str]]
    ):
        self.folder = RunFolder(path)
        self.name = self.folder.path.resolve().name
        self.device = device or torch.device("cpu")
        self.experiment = experiment
        self.unit, self.unit_kwargs = experiment.model.attention or "none", experiment.model.attention_kwargs
        self.batch_size, self.seed = experiment.train.batch_size, experiment.seed
        self.saved = {kind: (what, step_folders(self.folder.path / folder)) for kind, (what, folder) in saved.items()}
        what, places = self.saved["ema"]
        if not places:
            raise InputError(f"{path} has no {what}s yet")
        self.newest = list(places.values())[-1]

    @abstractmethod
    def build(self) -> nn.Module:
        """The recipe's network."""

    @abstractmethod
    def load(self, step: int, place: Path, weights: str) -> nn.Module:
        """The network with the weights that were saved there, in evaluation mode, on the device."""

    @abstractmethod
    def image_options(self) -> dict[str, Any]:
        """Arguments of `open_images` for the training images, except the source."""

    @abstractmethod
    def fingerprint(self) -> str | None:
        """The fingerprint of the training images; None if an older version didn't write it."""

    @abstractmethod
    def draw(self, seed: int, number: int, count: int) -> Any:
        """The random draws for the batch with this number, as training makes them; has `indices` (count,)."""

    @abstractmethod
    def batch(self, draws: Any) -> tuple[Tensor, Tensor | None]:
        """The drawn images as training feeds them to the network, and their labels (B,), on the device."""

    @abstractmethod
    def image_losses(self, model: nn.Module, images: Tensor, labels: Tensor | None, draws: Any) -> Tensor:
        """Each image's part (B,) of the training loss."""

    def training_losses(self, model: nn.Module, draws: Any) -> Tensor:
        """Each drawn image's part (B,) of the loss, at the time that training would draw for it."""
        return self.image_losses(model, *self.batch(draws), draws)

    def batches(self, draws: Any, coverage: Coverage) -> Iterator[Batch]:
        """Yields the drawn images in batches, each at all times of the coverage; calls its progress after each one."""
        count, num_times = len(draws.indices), self.num_times(coverage.num_times)
        for start in range(0, count, coverage.batch_size):
            part = draws.slice(start, min(start + coverage.batch_size, count))
            images, labels = self.batch(part)
            classes = None if self.images.labels is None else np.asarray(self.images.labels[part.indices])
            for time in range(num_times):
                if self.has_times:  # in place of uniform draws, the midpoints of equal intervals
                    part = replace(part, uniform=torch.full((len(images),), (time + 0.5) / num_times))
                losses = partial(self.image_losses, images=images, labels=labels, draws=part)
                yield Batch(time, slice(start, start + len(images)), classes, losses)
                coverage.progress(len(images))

    def num_times(self, asked: int) -> int:
        """The number of times that an analysis covers: `asked`, or 1 for a network without times."""
        return asked if self.has_times else 1

    def first_model(self) -> nn.Module:
        """The freshly initialized network, in evaluation mode; a run with `init_from` started from other weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(randomness.derive(self.seed, randomness.WEIGHTS))
            return self.build().eval().to(self.device)

    def model(self, step: int, weights: str = "ema") -> nn.Module:
        """The network with a step's averaged ("ema") or raw weights, in evaluation mode; step 0 is `first_model`.

        Raises:
            InputError: no weights of that step, or damaged ones.
        """
        if step == 0:
            return self.first_model()
        self.choose_steps([step], weights)
        return self.load(step, self.saved[weights][1][step], weights)

    def choose_steps(self, asked: Sequence[int] | None, weights: str = "ema") -> list[int]:
        """The requested steps, or all steps with saved weights.

        Raises:
            InputError: a step without weights, or none at all.
        """
        what, places = self.saved[weights]
        if not places:
            raise InputError(f"{self.folder.path} has no {what}s")
        if missing := [step for step in asked or () if step not in places]:
            steps = ", ".join(map(str, places))
            raise InputError(f"`--steps` must be among {steps}, the {what}s of {self.folder.path}, got {missing[0]}")
        return list(places) if asked is None else sorted(set(asked))

    def with_first(self, asked: Sequence[int] | None, weights: str = "ema", *, in_training: bool = False) -> list[int]:
        """`choose_steps`, preceded by step 0, the initial weights, if step 0 or no steps are requested.

        in_training: whether the network runs in training mode. In evaluation mode a BatchNorm without statistics does
            nothing, so step 0 of a network with BatchNorm is left out unless requested.
        """
        if asked is None:
            first = self.starts_at_first_weights and (in_training or not _has_batch_norm(self.first_model()))
            return [0] * first + self.choose_steps(None, weights)
        others = [step for step in asked if step != 0]
        return [0] * (0 in asked) + (self.choose_steps(others, weights) if others else [])

    def described(self) -> dict[str, Any]:
        """The fields that describe the run in records."""
        return {
            "run": self.name,
            "unit": self.unit,
            "unit_kwargs": self.unit_kwargs,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "images_fingerprint": self.images.fingerprint,
        }


class DiffusionRun(TrainedRun):
    """A run of `dia-diffusion train`: pipelines, checkpoints, noisy images."""

    has_times = True

    def __init__(self, path: str | Path, device: torch.device | None = None):
        experiment = read_experiment(str(RunFolder(path).config))
        saved = {"ema": ("pipeline", "pipelines"), "raw": ("checkpoint", "checkpoints")}
        super().__init__(path, device, experiment, saved)
        self.process = experiment.noise_process()
        self.starts_at_first_weights = experiment.init_from is None

    def build(self) -> nn.Module:
        return build_model(self.experiment.model)

    def load(self, step: int, place: Path, weights: str) -> nn.Module:
        if weights == "ema":
            return load_pipeline(self.folder.path, self.device, step=step).unet
        model = self.first_model()
        load_weights(model, without_heads(load_checkpoint(place).tensors["model"]), place)
        return model

    def image_options(self) -> dict[str, Any]:
        model = self.experiment.model
        return {"split": self.experiment.data.split, "size": model.sample_size, "channels": model.in_channels}

    def fingerprint(self) -> str | None:
        training = read_training(self.newest)
        return training["data"].get("fingerprint") if training else None

    def draw(self, seed: int, number: int, count: int) -> StepDraws:
        num_blocks = dropping_blocks(self.experiment.model)
        return draw_step(seed, number, count, len(self.images), self.images.shape, num_blocks=num_blocks)

    def batch(self, draws: StepDraws) -> tuple[Tensor, Tensor | None]:
        return training_batch(self.images, self.experiment, draws, self.device, torch.float32)

    def image_losses(self, model: nn.Module, images: Tensor, labels: Tensor | None, draws: StepDraws) -> Tensor:
        return image_losses(model, self.process, images, draws, labels)


class ClassifierRun(TrainedRun):
    """A run of `dia-diffusion classify`: augmented images, cross entropy. Without averaged weights, "ema" is "raw"."""

    has_times = False

    def __init__(self, path: str | Path, device: torch.device | None = None):
        experiment = read_experiment(str(RunFolder(path).config), kind=ClassifyExperiment)
        super().__init__(path, device, experiment, dict.fromkeys(("ema", "raw"), ("classifier", "classifiers")))

    def build(self) -> nn.Module:
        return build_classifier(self.experiment.model)

    def load(self, step: int, place: Path, weights: str) -> nn.Module:
        return load_classifier(place, self.device).model

    def image_options(self) -> dict[str, Any]:
        data = self.experiment.data
        decode = data.augmentation != "resized-crop"
        size = self.experiment.model.sample_size if decode else None
        return {"split": data.split, "size": size, "channels": 3, "decode": decode}

    def fingerprint(self) -> str | None:
        training = load_classifier(self.newest).training
        return training["data"].get("fingerprint") if training else None

    def draw(self, seed: int, number: int, count: int) -> ImageDraws:
        return with_files(self.images, self.experiment, draw_images(seed, number, count, len(self.images)))

    def batch(self, draws: ImageDraws) -> tuple[Tensor, Tensor | None]:
        pixels, labels = labelled_batch(self.images, self.experiment, draws, self.device)
        return normalized(pixels, self.experiment.data.mean, self.experiment.data.std), labels

    def image_losses(self, model: nn.Module, images: Tensor, labels: Tensor | None, draws: ImageDraws) -> Tensor:
        assert labels is not None
        smoothing = self.experiment.train.label_smoothing
        return F.cross_entropy(model(images), labels, label_smoothing=smoothing, reduction="none")


def open_runs(
    paths: Sequence[str | Path],
    source: str | None = None,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[TrainedRun]:
    """Opens runs with their images; each set of images is read only once.

    source: where the images are now; None: where each run's recipe says.
    progress: called with (images read, total).

    Raises:
        InputError: no such run or images, or other images than a run was trained on.
    """
    runs = [open_run(path, device) for path in paths]
    opened: dict[tuple[Any, ...], ImageSet] = {}
    for run in runs:
        place, options = source or run.experiment.data.source, run.image_options()
        key = (place, *options.items())
        if key not in opened:
            opened[key] = open_images(place, **options, progress=progress)
        run.images = opened[key]
        if run.images.fingerprint != (run.fingerprint() or run.images.fingerprint):
            raise InputError(f"{place} has other images than {run.folder.path} was trained on; give those as --data")
    return runs


def open_run(path: str | Path, device: torch.device | None = None) -> TrainedRun:
    """Opens a run of any kind, without its images.

    Raises:
        InputError: not a run's folder, or one without weights.
    """
    config = RunFolder(path).config
    if not config.is_file():
        raise InputError(f"a run must be a folder that `dia-diffusion train` or `classify` has written, got {path}")
    recipe = read_yaml(config, "recipe", "data, model, train")
    return DiffusionRun(path, device) if command_of(recipe) == "train" else ClassifierRun(path, device)


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
