"""A run as the analyses see it: its recipe, its weights at each step, and batches of the images it was trained on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.errors import InputError
from dia_diffusion.files import step_folders
from dia_diffusion.models.uvit import Block, UViT
from dia_diffusion.pipelines.card import read_training
from dia_diffusion.sampling.load import load_pipeline
from dia_diffusion.training.checkpoint import load_checkpoint, load_weights
from dia_diffusion.training.images import training_batch
from dia_diffusion.training.randomness import WEIGHTS, StepDraws, derive, draw_step
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.run_folder import RunFolder
from dia_diffusion.training.snapshot import build_model


class TrainedRun:
    """A run's folder, opened for reading.

    Args:
        path: the run folder.
        device: where models and batches go.

    Raises:
        InputError: no run's folder, or one without pipelines.
    """

    def __init__(self, path: str | Path, device: torch.device | None = None):
        self.folder = RunFolder(path)
        if not self.folder.config.is_file():
            raise InputError(f"{path} is no run folder; accepted: what `dia-diffusion train` writes, with config.yaml")
        self.name = self.folder.path.resolve().name
        self.experiment = read_experiment(str(self.folder.config))
        self.process = self.experiment.noise_process()
        self.device = device or torch.device("cpu")
        self.pipelines = step_folders(self.folder.pipelines)
        if not self.pipelines:
            raise InputError(f"{path} has no pipelines yet")
        self.images: ImageSet | None = None

    def averaged_model(self, step: int) -> UViT:
        """The network with the averaged weights of a pipeline's step, in evaluation mode.

        Raises:
            InputError: no pipeline of that step, or one that can't be loaded.
        """
        model = load_pipeline(self.folder.path, self.device, step=step).unet
        if not isinstance(model, UViT):
            raise InputError(f"{self.pipelines[step]} holds a {type(model).__name__}; accepted: a UViT")
        return model

    def first_model(self) -> UViT:
        """The network as it was before its first step; a run with init_from began elsewhere."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.experiment.seed, WEIGHTS))
            return build_model(self.experiment.model).eval().to(self.device)

    def trained_model(self, step: int) -> UViT:
        """The network with the weights of a checkpoint themselves, not their average.

        Raises:
            InputError: no checkpoint of that step, or a damaged one.
        """
        self.choose_steps([step], "raw")
        place, model = self._checkpoints()[step], self.first_model()
        load_weights(model, load_checkpoint(place).tensors["model"], place)
        return model

    def choose_steps(self, asked: Sequence[int] | None, weights: str = "ema") -> list[int]:
        """The steps asked for, or all that have a pipeline; with weights "raw", a checkpoint.

        Raises:
            InputError: a step without one, or no checkpoints.
        """
        kind, places = ("pipeline", self.pipelines) if weights == "ema" else ("checkpoint", self._checkpoints())
        if missing := [step for step in asked or () if step not in places]:
            accepted = ", ".join(map(str, places)) or "none"
            raise InputError(f"{self.folder.path} has no {kind} of step {missing[0]}; accepted: {accepted}")
        if not places:
            raise InputError(f"{self.folder.path} has no {kind}s")
        return list(places) if asked is None else sorted(set(asked))

    def _checkpoints(self) -> dict[int, Path]:
        return step_folders(self.folder.checkpoints)

    def require_unit(self) -> None:
        """Raises InputError for a run without attention unit."""
        if self.experiment.model.attention == "none":
            raise InputError(f"{self.folder.path} was trained without attention unit; accepted: runs with one")

    def draw(self, seed: int, number: int, count: int) -> StepDraws:
        """What is random in the batch of that number, as training draws a step's."""
        images = self._images()
        return draw_step(seed, number, count, len(images), images.images.shape[1:])

    def draw_others(self, seed: int, count: int) -> StepDraws:
        """The draws after `draw(seed, 0, count)`, of other images: what is fitted on those is measured on these.

        Raises:
            InputError: the run has too few images.
        """
        if 2 * count > len(self._images()):
            raise InputError(
                f"{count} images and as many others are more than the {len(self._images()):,} that {self.folder.path} "
                f"was trained on; accepted: {len(self._images()) // 2} or fewer"
            )
        return self.draw(seed, 1, count)

    def batch(self, draws: StepDraws) -> tuple[Tensor, Tensor | None]:
        """Images (B, C, H, W) in [-1, 1] and labels (B,), prepared as the run's training does."""
        return training_batch(self._images(), self.experiment, draws, self.device, torch.float32)

    def described(self) -> dict[str, Any]:
        """For records: what the run is."""
        recipe = self.experiment
        return {
            "run": self.name,
            "unit": recipe.model.attention,
            "unit_kwargs": recipe.model.attention_kwargs,
            "batch_size": recipe.train.batch_size,
            "seed": recipe.seed,
            "images_fingerprint": self._images().fingerprint,
        }

    def _images(self) -> ImageSet:
        if self.images is None:
            raise ValueError(f"{self.name} was opened without its images; use open_runs")
        return self.images


def blocks_of(model: UViT) -> list[Block]:
    """The network's blocks in the order in which it runs them."""
    return cast(list[Block], [*model.in_blocks, model.mid_block, *model.out_blocks])


def spread(num_times: int) -> Tensor:
    """(T,) in (0, 1), as `uniform` of training's draws: the middles of equally likely parts of time."""
    return (torch.arange(num_times) + 0.5) / num_times


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
    runs = [TrainedRun(path, device) for path in paths]
    opened: dict[tuple[Any, ...], ImageSet] = {}
    for run in runs:
        data, model = run.experiment.data, run.experiment.model
        place = source or data.source
        key = (place, data.split, model.sample_size, model.in_channels)
        if key not in opened:
            opened[key] = open_images(
                place, split=data.split, size=model.sample_size, channels=model.in_channels, progress=progress
            )
        run.images = opened[key]
        training = read_training(list(run.pipelines.values())[-1]) or {"data": {}}
        trained_on = training["data"].get("fingerprint", run.images.fingerprint)
        if run.images.fingerprint != trained_on:
            raise InputError(f"{place} has other images than {run.folder.path} was trained on; give those as --data")
    return runs
