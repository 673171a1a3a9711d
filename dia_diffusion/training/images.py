"""The images a recipe trains on."""

from accelerate import Accelerator

from dia_diffusion.data import ImageSet
from dia_diffusion.data.open_together import open_images_together
from dia_diffusion.errors import InputError
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.reporter import Reporter


def open_training_images(experiment: Experiment, accelerator: Accelerator, reporter: Reporter) -> ImageSet:
    """The recipe's images at its model's size, on each process.

    Raises:
        InputError: no such images, or without the classes that the model needs; on all processes if on one.
    """
    data, model = experiment.data, experiment.model
    options = {"size": model.sample_size, "channels": model.in_channels, "split": data.split}
    images = open_images_together(data.source, accelerator, reporter.reading, **options)
    if model.num_classes is None:
        return images
    if images.labels is None:
        raise InputError(f"data.source {data.source} has no classes, which model.num_classes needs")
    present = int(images.labels.max()) + 1
    if present > model.num_classes:
        raise InputError(
            f"data.source {data.source} has {present} classes and model.num_classes is {model.num_classes}; "
            f"accepted: {present} or more"
        )
    return images
