"""Opens runs of every kind for the analyses."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dia_diffusion.analysis.classifier_run import ClassifierRun
from dia_diffusion.analysis.diffusion_run import DiffusionRun
from dia_diffusion.analysis.trained_run import TrainedRun
from dia_diffusion.data import ImageSet
from dia_diffusion.errors import InputError
from dia_diffusion.reading import read_yaml
from dia_diffusion.training.run_folder import RunFolder


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
