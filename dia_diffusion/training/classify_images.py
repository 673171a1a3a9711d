"""The batches that a classifier sees: decoded sets in memory or mapped, or files decoded in time for their step."""

from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from dia_diffusion.data import ImageSet
from dia_diffusion.data.decode import to_pixels
from dia_diffusion.data.encoded import EncodedSet, gather, open_encoded
from dia_diffusion.data.open_together import open_images_together
from dia_diffusion.distributed import first_on_each_machine
from dia_diffusion.errors import InputError
from dia_diffusion.training.augmentation import ImageDraws, cut_out, mirrored, pad_cropped, resized_crop
from dia_diffusion.training.classify_config import ClassifyExperiment, LabelledDataConfig
from dia_diffusion.training.reporter import Reporter
from dia_diffusion.transfer import sent

TEST_CROP = 0.875
"""The share of a test image's centre square that "resized-crop" is tested on, in height and width."""

AnySet = ImageSet | EncodedSet


def open_labelled(experiment: ClassifyExperiment, test: bool, accelerator: Accelerator, reporter: Reporter) -> AnySet:
    """The recipe's training or test images, on each process.

    Raises:
        InputError: no such images, or other classes than the model's; on all processes if on one.
    """
    data, model = experiment.data, experiment.model
    source, split = (data.source, data.split) if not test else _test_place(data)
    images: AnySet
    if data.augmentation == "resized-crop":
        images = first_on_each_machine(accelerator, lambda: open_encoded(source, split))
    else:
        options = {"size": model.sample_size, "channels": 3, "split": split}
        images = open_images_together(source, accelerator, reporter.reading, **options)
    if images.labels is None:
        raise InputError(f"{source} has no classes; accepted: class folders, or a data set with labels")
    present = int(images.labels.max()) + 1
    if images.class_names is not None:
        present = len(images.class_names)
    if present != model.num_classes:
        raise InputError(
            f"{source} has {present} classes and model.num_classes is {model.num_classes}; make them equal"
        )
    return images


def _test_place(data: LabelledDataConfig) -> tuple[str, str]:
    if data.test_source is None:
        return data.source, data.test_split or "test"
    return data.test_source, data.test_split or "train"


def check_apart(train: AnySet, test: AnySet) -> None:
    """Raises InputError where the test images are the training images, or their classes have other names."""
    if train.fingerprint == test.fingerprint:
        raise InputError(f"the test images are the training images ({train.name}); name others as data.test_source")
    if train.class_names and test.class_names and train.class_names != test.class_names:
        pair = next((a, b) for a, b in zip(train.class_names, test.class_names, strict=True) if a != b)
        raise InputError(f"the classes of {train.name} and {test.name} differ: {pair[0]!r} and {pair[1]!r}")


class Batches:
    """Augmented uint8 batches of one set, as steps draw them.

    Args:
        images: the set.
        experiment: the recipe.
        draws_of: the draws of a step's images start..stop; of files, those of the next step are decoded while the
            device computes.
    """

    def __init__(self, images: AnySet, experiment: ClassifyExperiment, draws_of: Callable[[int, int, int], ImageDraws]):
        self.images, self.draws_of = images, draws_of
        self.data, self.size = experiment.data, experiment.model.sample_size
        self.max_steps = experiment.train.max_steps
        self.ahead: dict[tuple[int, int], list[Future[np.ndarray]]] = {}

    def take(self, draws: ImageDraws, device: torch.device) -> tuple[Tensor, Tensor]:
        """The images (B, 3, H, W), uint8, and labels (B,) of a slice of a step's draws."""
        assert self.images.labels is not None
        labels = sent(torch.from_numpy(self.images.labels[draws.indices]), device)
        if isinstance(self.images, EncodedSet):
            pixels = mirrored(sent(torch.from_numpy(self._decoded(self.images, draws)), device), draws.uniform)
        else:
            pixels = sent(torch.from_numpy(self.images.images[draws.indices]), device)
            if self.data.augmentation == "pad-crop":
                reflected = self.data.border == "reflected"
                pixels = pad_cropped(mirrored(pixels, draws.uniform), draws.uniform, reflected)
        return cut_out(pixels, draws.uniform, self.data.cutout) if self.data.cutout else pixels, labels

    def _decoded(self, images: EncodedSet, draws: ImageDraws) -> np.ndarray:
        futures = self.ahead.pop((draws.step, draws.first), None) or self._start(images, draws)
        if draws.step + 1 < self.max_steps:
            following = self.draws_of(draws.step + 1, draws.first, draws.first + len(draws.indices))
            self.ahead[following.step, following.first] = self._start(images, following)
        return gather(futures)

    def _start(self, images: EncodedSet, draws: ImageDraws) -> "list[Future[np.ndarray]]":
        return images.start(draws.indices, lambda k, image: resized_crop(image, self.size, draws.uniform[k]))


def test_pixels(images: AnySet, indices: np.ndarray, size: int) -> Tensor:
    """Test images (B, 3, size, size), uint8, without augmentation."""
    if isinstance(images, ImageSet):
        return torch.from_numpy(images.images[indices])

    def centre(_: int, image: Image.Image) -> np.ndarray:
        whole = round(size / TEST_CROP)
        edge = (whole - size) // 2
        return to_pixels(image, whole, 3)[edge : edge + size, edge : edge + size].transpose(2, 0, 1)

    return torch.from_numpy(gather(images.start(indices, centre)))
