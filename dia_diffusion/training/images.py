"""The images a recipe trains on."""

from functools import partial

from accelerate import Accelerator

from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.data.sources import DOWNLOADS
from dia_diffusion.distributed import first_on_each_machine, together
from dia_diffusion.errors import InputError
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.reporter import Reporter


def open_training_images(experiment: Experiment, accelerator: Accelerator, reporter: Reporter) -> ImageSet:
    """The recipe's images at its model's size, on each process.

    Raises:
        InputError: no such images, or without the classes that the model needs; on all processes if on one.
    """
    in_turn = first_on_each_machine if experiment.data.source in DOWNLOADS else together
    return in_turn(accelerator, lambda: _open(experiment, reporter if accelerator.is_main_process else None))


def _open(experiment: Experiment, reporter: Reporter | None) -> ImageSet:
    data, model = experiment.data, experiment.model
    images = open_images(
        data.source,
        size=model.sample_size,
        channels=model.in_channels,
        split=data.split,
        progress=None if reporter is None else partial(reporter.reading, "images"),
        download_progress=None if reporter is None else partial(reporter.reading, "bytes"),
    )
    if model.num_classes is None:
        return images
    if images.labels is None:
        raise InputError(f"data.source {data.source} has no class folders, which model.num_classes needs")
    present = int(images.labels.max()) + 1
    if present > model.num_classes:
        raise InputError(
            f"data.source {data.source} has {present} classes and model.num_classes is {model.num_classes}; "
            f"accepted: {present} or more"
        )
    return images
