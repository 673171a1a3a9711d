"""Training of the classifiers whose features measure images, seeded, with what was done recorded beside the weights."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import FEATURES
from dia_diffusion.evaluation.features.classifier import Classifier
from dia_diffusion.evaluation.features.extractor import load_weights
from dia_diffusion.evaluation.features.fit_cifar10 import Cifar10Recipe, fit_cifar10
from dia_diffusion.evaluation.features.fit_digits import DigitsRecipe, fit_digits
from dia_diffusion.files import sha256_of_file, whole_file, write_json

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Training:
    """How one set of features is trained."""

    fit: Callable[..., Classifier]
    recipe: Any
    source: str
    """The images it is trained on, where no others are named."""
    data: str
    """What the features are named for: where it comes from, and its licence."""
    half: bool = False
    """Kernels are stored in half precision, which halves the file; vectors, such as a norm's variances, never."""


TRAININGS = {
    "digits": Training(
        fit_digits,
        DigitsRecipe(),
        "digits",
        "scikit-learn's handwritten digits (UCI optical recognition of handwritten digits, CC BY 4.0)",
    ),
    "cifar10": Training(
        fit_cifar10,
        Cifar10Recipe(),
        "cifar10",
        "CIFAR-10 (Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images; no licence stated)",
        half=True,
    ),
}


def train_features(
    name: str,
    out: str | Path,
    *,
    data: str | Path | None = None,
    test_data: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains the features called `name` into OUT, a safetensors file, with a JSON file of the same name beside it.

    data: images with a train and a test part; None: those that the features are named for.
    test_data: other images to test on, all of them; `data` then needs no test part.

    Returns what the JSON holds: seed, recipe, data, accuracies, licence, sha256. `progress` gets (steps done, steps).
    Raises InputError for an unknown name, for images without the classes, and for an `out` that doesn't end in
    .safetensors or exists already, or whose JSON does.
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
    training, network = TRAININGS[name], FEATURES[name].network
    source = data or training.source
    train = _open(source, "train", network)
    test = _open(source, "test", network) if test_data is None else _open(test_data, "train", network)
    fitted = training.fit(train.images, train.labels, training.recipe, seed=seed, progress=progress)
    with whole_file(out) as temporary:
        save_file(_rounded(fitted.state_dict()) if training.half else fitted.state_dict(), temporary)
    classifier = load_weights(network(), out).eval()  # what is stored is what is tested
    card = {
        "features": name,
        "num_features": network.num_features,
        "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
        "seed": seed,
        "recipe": asdict(training.recipe),
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
    write_json(card_file, card)
    return card


@torch.no_grad()
def accuracy(classifier: Classifier, images: ImageSet) -> float:
    """The share of images, at the classifier's size, whose label is the classifier's first choice."""
    pixels = torch.from_numpy(images.images)
    choices = torch.cat([classifier(batch.float() / 255)[1].argmax(1) for batch in pixels.split(500)])
    return (choices.numpy() == images.labels).mean().item()


def _open(source: str | Path, split: str, network: type[Classifier]) -> ImageSet:
    images = open_images(source, split=split, size=network.image_size, channels=network.in_channels)
    if images.labels is None or set(images.labels.tolist()) != set(range(network.num_classes)):
        found = 0 if images.labels is None else len(set(images.labels.tolist()))
        raise InputError(f"{source} has {found} classes; accepted: images of {network.num_classes} classes")
    return images


def _rounded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
