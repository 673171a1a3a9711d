"""Training of the classifiers whose features measure images, seeded, with what was done recorded beside the weights."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import FEATURES
from dia_diffusion.evaluation.features.classifier import Classifier
from dia_diffusion.evaluation.features.digits import DigitsClassifier
from dia_diffusion.evaluation.features.extractor import load_weights
from dia_diffusion.evaluation.features.fit_digits import DigitsRecipe, fit_digits
from dia_diffusion.io import atomic_file, sha256_of_file, write_json
from dia_diffusion.progress import Progress
from dia_diffusion.training.classification import ClassificationTask
from dia_diffusion.training.config import ClassifyExperiment
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.trainer import Trainer

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Fitted:
    """A trained classifier."""

    tensors: Tensors
    recipe: dict[str, Any]
    train: ImageSet
    test: ImageSet
    on_main: bool = True
    """Whether this is the process that writes it; the others are on their own after the training."""


def _fit_digits(
    recipe: DigitsRecipe, source: str, test_source: str | None, seed: int, run: Path, reporter: Progress
) -> Fitted:
    train = _open_digits(source, "train")
    test = _open_digits(source, "test") if test_source is None else _open_digits(test_source, "train")

    assert train.labels is not None
    progress = partial(reporter.update, "training", "steps")
    fitted = fit_digits(train.read(range(len(train))), train.labels, recipe, seed=seed, progress=progress)
    return Fitted(fitted.state_dict(), asdict(recipe), train, test)


def _open_digits(source: str, split: str) -> ImageSet:
    network = DigitsClassifier
    images = open_images(source, split=split, size=network.image_size, channels=network.in_channels)
    if images.labels is None or set(images.labels.tolist()) != set(range(network.num_classes)):
        found = 0 if images.labels is None else len(set(images.labels.tolist()))
        raise InputError(f"{source} has {found} classes; accepted: images of {network.num_classes} classes")
    return images


def _fit_cifar10(recipe: str, source: str, test_source: str | None, seed: int, run: Path, reporter: Progress) -> Fitted:
    keys = {"output": str(run), "seed": seed, "data.source": source, "data.test_source": test_source}
    task = ClassificationTask(read_experiment(recipe, keys=keys, kind=ClassifyExperiment))
    trainer = Trainer(task, reporter)
    trainer.run()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in trainer.model.state_dict().items()}
    train, test = task.train_images, task.test_images
    assert isinstance(train, ImageSet) and isinstance(test, ImageSet)
    return Fitted(tensors, task.experiment.to_dict(), train, test, trainer.accelerator.is_main_process)


@dataclass(frozen=True)
class Training:
    """How one set of features is trained."""

    fit: Callable[..., Fitted]
    recipe: Any
    source: str
    """The images it is trained on, where no others are named."""
    data: str
    """What the features are named for: where it comes from, and its licence."""
    half: bool = False
    """Kernels are stored in half precision, which halves the file; vectors, such as a norm's variances, never."""


TRAININGS = {
    "digits": Training(
        _fit_digits,
        DigitsRecipe(),
        "digits",
        "scikit-learn's handwritten digits (UCI optical recognition of handwritten digits, CC BY 4.0)",
    ),
    "cifar10": Training(
        _fit_cifar10,
        "cifar10_features",
        "cifar10",
        "CIFAR-10 (Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images; no licence stated)",
        half=True,
    ),
}


def train_features(
    name: str,
    out: str | Path,
    *,
    reporter: Progress,
    data: str | Path | None = None,
    test_data: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Trains the features called `name` into OUT, a safetensors file, with a JSON file of the same name beside it.

    `cifar10` is trained by the recipe of `dia-diffusion classify` of that name, on any number of processes, in a run
    folder beside OUT whose name ends in .run: a training that was stopped goes on from there.

    data: images with a train and a test part; None: those that the features are named for.
    test_data: other images to test on, all of them; `data` then needs no test part.

    Returns what the JSON holds: seed, recipe, data, accuracies, licence, sha256; None but on the main process.
    Raises InputError for an unknown name, for images without the classes, for an `out` that doesn't end in
    .safetensors or exists already, or whose JSON does, and for a run folder of another training; Stopped by a signal.
    """
    out = Path(out)
    if name not in TRAININGS:
        raise InputError(f"no training for features {name!r}; there are: {', '.join(TRAININGS)}")
    if out.suffix != ".safetensors":
        raise InputError(f"the file for the weights must end in .safetensors, got {out}")
    card_file = out.with_suffix(".json")
    for path in (out, card_file):
        if path.exists():
            raise InputError(f"{path} exists already; name another file, or remove it")
    training = TRAININGS[name]
    test_source = None if test_data is None else str(test_data)
    run = out.with_suffix(".run")
    fitted = training.fit(training.recipe, str(data or training.source), test_source, seed, run, reporter)

    if not fitted.on_main:
        return None
    card = _store(name, training, fitted, seed, out)
    write_json(card_file, card)
    reporter.message(f"{out}: test accuracy {card['test_accuracy']:.2%}")
    return card


def _store(name: str, training: Training, fitted: Fitted, seed: int, out: Path) -> dict[str, Any]:
    """Writes the weights; returns their card."""
    with atomic_file(out) as temporary:
        save_file(_rounded(fitted.tensors) if training.half else fitted.tensors, temporary)
    network = FEATURES[name].network
    classifier = load_weights(network(), out).eval()  # what is stored is what is tested
    train, test = fitted.train, fitted.test
    return {
        "features": name,
        "num_features": network.num_features,
        "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
        "seed": seed,
        "recipe": fitted.recipe,
        "data": training.data,
        "source": train.name,
        "train_images": len(train),
        "train_fingerprint": train.fingerprint,
        "train_accuracy": accuracy(classifier, train),
        "test_images": len(test),
        "test_fingerprint": test.fingerprint,
        "test_accuracy": accuracy(classifier, test),
        "licence": "Apache-2.0",
        "torch": torch.__version__,
        "sha256": sha256_of_file(out),
    }


@torch.no_grad()
def accuracy(classifier: Classifier, images: ImageSet) -> float:
    """The share of images, at the classifier's size, whose label is the classifier's first choice."""
    pixels = torch.from_numpy(images.read(range(len(images))))
    choices = torch.cat([classifier(batch.float() / 255).argmax(1) for batch in pixels.split(500)])
    return (choices.numpy() == images.labels).mean().item()


def _rounded(tensors: Tensors) -> Tensors:
    return {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
