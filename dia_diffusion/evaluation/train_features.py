"""Training of the classifiers whose features measure images, seeded, with what was done recorded beside the weights."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dia_diffusion.data import open_images
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import DigitsClassifier
from dia_diffusion.files import sha256_of_file, whole_file, write_json

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class DigitsRecipe:
    """AdamW with a cosine rate on images that are turned, scaled, shifted and made noisy at random."""

    steps: int = 3000
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    max_degrees: float = 10.0
    max_scaling: float = 0.1
    max_shift: float = 1.0
    """In pixels."""
    max_noise: float = 0.05
    """The largest standard deviation of the noise; each image has its own, from 0 up."""


def train_features(name: str, out: str | Path, *, seed: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """Trains the features called `name` into OUT, a safetensors file, with a JSON file of the same name beside it.

    Returns what the JSON holds: seed, recipe, data, accuracies, licence, sha256. `progress` gets (steps done, steps).
    Raises InputError for an unknown name, and for an `out` that doesn't end in .safetensors.
    """
    out = Path(out)
    if name != "digits":
        raise InputError(f"no training for features {name!r}; there is: digits")
    if out.suffix != ".safetensors":
        raise InputError(f"the file for the weights must end in .safetensors, got {out}")
    train, test = (open_images("digits", split=split, channels=1) for split in ("train", "test"))
    assert train.labels is not None and test.labels is not None
    recipe = DigitsRecipe()
    classifier = fit_digits(train.images, train.labels, recipe, seed=seed, progress=progress)
    out.with_suffix(".json").unlink(missing_ok=True)  # the card of other weights must not stand beside these
    with whole_file(out) as temporary:
        save_file(classifier.state_dict(), temporary)
    card = {
        "features": name,
        "num_features": classifier.head.in_features,
        "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
        "seed": seed,
        "recipe": asdict(recipe),
        "data": "scikit-learn's handwritten digits (UCI optical recognition of handwritten digits, CC BY 4.0)",
        "train_images": len(train),
        "train_fingerprint": train.fingerprint,
        "train_accuracy": accuracy(classifier, train.images, train.labels),
        "test_images": len(test),
        "test_fingerprint": test.fingerprint,
        "test_accuracy": accuracy(classifier, test.images, test.labels),
        "licence": "Apache-2.0",
        "torch": torch.__version__,
        "sha256": sha256_of_file(out),
    }
    write_json(out.with_suffix(".json"), card)
    return card


def fit_digits(
    images: np.ndarray, labels: np.ndarray, recipe: DigitsRecipe, *, seed: int, progress: Progress | None = None
) -> DigitsClassifier:
    """A classifier fitted to uint8 images (N, 1, 8, 8) and int64 labels (N,); `seed` alone fixes what is random."""
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
        _, logits = classifier(_augment(inputs[chosen], recipe, generator))
        optimizer.zero_grad()
        F.cross_entropy(logits, targets[chosen], label_smoothing=recipe.label_smoothing).backward()
        optimizer.step()
        if progress is not None:
            progress(step + 1, recipe.steps)
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier: DigitsClassifier, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of uint8 images (N, 1, 8, 8) whose label is the classifier's first choice."""
    _, logits = classifier(torch.from_numpy(images).float() / 255)
    return (logits.argmax(1).numpy() == labels).mean().item()


def _augment(images: torch.Tensor, recipe: DigitsRecipe, generator: torch.Generator) -> torch.Tensor:
    """Each image (B, 1, H, W) in [0, 1] turned, scaled and shifted by its own draw, then noise of its own strength."""

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
