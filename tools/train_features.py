"""Trains the classifiers whose features measure images, and writes their weights with a JSON card of the training.

    python tools/train_features.py digits
    accelerate launch tools/train_features.py cifar10

The packaged weights in dia_diffusion/evaluation/features/weights are made by these two commands.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import save_file

from dia_diffusion.cli.console import ConsoleProgress
from dia_diffusion.cli.main import run_script
from dia_diffusion.cli.options import Metavar, Positional
from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import PACKAGED
from dia_diffusion.evaluation.features.extractor import load_weights
from dia_diffusion.evaluation.features.packaged import Classifier, DigitsClassifier
from dia_diffusion.io import atomic_file, sha256_of_file, write_json
from dia_diffusion.progress import Progress
from dia_diffusion.training.classification import ClassificationTask
from dia_diffusion.training.config import ClassifyExperiment
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.trainer import Trainer
from dia_diffusion.validation import Strict

CIFAR10_RECIPE = "cifar10_features"
DATA = {
    "digits": "scikit-learn's handwritten digits (UCI optical recognition of handwritten digits, CC BY 4.0)",
    "cifar10": "CIFAR-10 (Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images; no license stated)",
}


class Options(Strict):
    """Trains a classifier that provides features for distances."""

    name: Annotated[Literal["digits", "cifar10"], Positional("NAME")]
    """The features: digits or cifar10."""
    data: Annotated[str | None, Metavar("DATA")] = None
    """Images in ten classes; by default the dataset that the features are named after."""
    test_data: Annotated[str | None, Metavar("DATA")] = None
    """Other images to test on, all of them; by default the test split of --data."""
    out: Annotated[Path | None, Metavar("FILE.safetensors")] = None
    """File for the weights, by default NAME.safetensors. cifar10 keeps its run next to them, in FILE.run."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of weights, batches and augmentation."""


@dataclass(frozen=True)
class DigitsRecipe:
    """AdamW with a cosine schedule, on images that are randomly rotated, scaled, shifted and noised."""

    steps: int = 3000
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    max_degrees: float = 10.0
    max_scaling: float = 0.1
    max_shift: float = 1.0
    """Largest shift in pixels."""
    max_noise: float = 0.05
    """The largest standard deviation of the noise; each image has its own, from 0 up."""


DIGITS_RECIPE = DigitsRecipe()


@dataclass(frozen=True)
class Trained:
    """A trained classifier, and the images it was trained and tested on."""

    tensors: dict[str, torch.Tensor]
    recipe: dict[str, Any]
    train: ImageSet
    test: ImageSet
    on_main: bool = True
    """Whether this process writes the files."""


def train_features(options: Options, reporter: Progress) -> dict[str, Any] | None:
    """Trains a classifier; returns its card, or None on all but the main process.

    A stopped training of `cifar10` resumes from its run folder next to the weights.

    Raises:
        InputError: images don't have ten classes, `out` exists or isn't a .safetensors file, or its run folder is from
            another training.
        Stopped: after a signal.
    """
    out = options.out or Path(f"{options.name}.safetensors")
    if out.suffix != ".safetensors":
        raise InputError(f"`--out` must be a file ending in .safetensors, got {out}")
    card_file = out.with_suffix(".json")
    for path in (out, card_file):
        if path.exists():
            raise InputError(f"{path} exists already; name another file, or remove it")
    trained = (_train_digits if options.name == "digits" else _train_cifar10)(options, out, reporter)
    if not trained.on_main:
        return None
    with atomic_file(out) as temporary:
        save_file(trained.tensors, temporary)
    card = _card(options, trained, out)
    write_json(card_file, card)
    reporter.message(f"{out}: test accuracy {card['test_accuracy']:.2%}")
    return card


def _train_cifar10(options: Options, out: Path, reporter: Progress) -> Trained:
    """Trains with the recipe of `dia-diffusion classify`; kernels are stored in half precision to halve the file."""
    keys = {"output": str(out.with_suffix(".run")), "seed": options.seed}
    keys |= {"data.source": options.data or "cifar10", "data.test_source": options.test_data}
    task = ClassificationTask(read_experiment(CIFAR10_RECIPE, keys=keys, kind=ClassifyExperiment))
    trainer = Trainer(task, reporter)
    trainer.run()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in trainer.model.state_dict().items()}
    # Vectors, such as the variances of a norm, stay in float32.
    tensors = {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    images = task.train_images, task.test_images
    return Trained(tensors, task.experiment.to_dict(), *images, trainer.accelerator.is_main_process)


def _train_digits(options: Options, out: Path, reporter: Progress) -> Trained:
    source = options.data or "digits"
    train = _open_digits(source, "train")
    test = _open_digits(source, "test") if options.test_data is None else _open_digits(options.test_data, "train")
    assert train.labels is not None
    progress = partial(reporter.update, "training", "steps")
    classifier = fit_digits(train.read(range(len(train))), train.labels, DIGITS_RECIPE, options.seed, progress)
    return Trained(classifier.state_dict(), asdict(DIGITS_RECIPE), train, test)


def _open_digits(source: str, split: str) -> ImageSet:
    network = DigitsClassifier
    images = open_images(source, split=split, size=network.image_size, channels=network.in_channels)
    classes = set() if images.labels is None else set(images.labels.tolist())
    if classes != set(range(network.num_classes)):
        raise InputError(f"{source} must have images of {network.num_classes} classes, got {len(classes)} classes")
    return images


def fit_digits(
    images: np.ndarray,
    labels: np.ndarray,
    recipe: DigitsRecipe,
    seed: int,
    progress: Callable[[int, int], None] = lambda step, steps: None,
) -> DigitsClassifier:
    """A classifier fitted to uint8 images (N, 1, 8, 8) and int64 labels (N,); `seed` determines all randomness."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = DigitsClassifier()
    inputs, targets = torch.from_numpy(images).float() / 255, torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=recipe.weight_decay)
    for step in range(recipe.steps):
        chosen = torch.randint(len(inputs), (recipe.batch_size,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * (1 + math.cos(math.pi * step / recipe.steps)) / 2
        logits = classifier(_augment(inputs[chosen], recipe, generator))
        optimizer.zero_grad()
        F.cross_entropy(logits, targets[chosen], label_smoothing=recipe.label_smoothing).backward()
        optimizer.step()
        progress(step + 1, recipe.steps)
    return classifier.eval()


def _augment(images: torch.Tensor, recipe: DigitsRecipe, generator: torch.Generator) -> torch.Tensor:
    """Rotates, scales and shifts each image (B, 1, H, W) in [0, 1] by separate random amounts, and adds noise."""

    def uniform(*shape: int) -> torch.Tensor:
        return 2 * torch.rand(len(images), *shape, generator=generator) - 1

    angle = math.radians(recipe.max_degrees) * uniform()
    scale = 1 + recipe.max_scaling * uniform()
    shift = recipe.max_shift * 2 / images.shape[-1] * uniform(2)  # grid coordinates run from -1 to 1
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rotation = torch.stack([cosine, -sine, sine, cosine], dim=1).view(-1, 2, 2)
    grid = F.affine_grid(torch.cat([rotation, shift[..., None]], dim=2), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    deviation = recipe.max_noise * torch.rand(len(images), 1, 1, 1, generator=generator)
    return (moved + deviation * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def _card(options: Options, trained: Trained, file: Path) -> dict[str, Any]:
    """A record of the training; accuracies are those of the stored weights."""
    network = PACKAGED[options.name].network
    classifier = load_weights(network(), file).eval()
    train, test = trained.train, trained.test
    return {
        "features": options.name,
        "num_features": network.num_features,
        "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
        "seed": options.seed,
        "recipe": trained.recipe,
        "data": DATA[options.name],
        "source": train.name,
        "train_images": len(train),
        "train_fingerprint": train.fingerprint,
        "train_accuracy": accuracy(classifier, train),
        "test_images": len(test),
        "test_fingerprint": test.fingerprint,
        "test_accuracy": accuracy(classifier, test),
        "licence": "Apache-2.0",
        "torch": torch.__version__,
        "sha256": sha256_of_file(file),
    }


@torch.no_grad()
def accuracy(classifier: Classifier, images: ImageSet) -> float:
    """Top-1 accuracy on images of the classifier's size."""
    pixels = torch.from_numpy(images.read(range(len(images))))
    choices = torch.cat([classifier(batch.float() / 255).argmax(1) for batch in pixels.split(500)])
    return (choices.numpy() == images.labels).mean().item()


def run(options: Options) -> None:
    """Trains the classifier and saves its weights."""
    reporter = ConsoleProgress()
    try:
        train_features(options, reporter)
    finally:
        reporter.close()


if __name__ == "__main__":
    sys.exit(run_script("train_features.py", Options, run))
