"""Training of the classifier of digits."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from dia_diffusion.evaluation.features.packaged import DigitsClassifier


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


def fit_digits(
    images: np.ndarray,
    labels: np.ndarray,
    recipe: DigitsRecipe,
    *,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
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
        logits = classifier(_augment(inputs[chosen], recipe, generator))
        optimizer.zero_grad()
        F.cross_entropy(logits, targets[chosen], label_smoothing=recipe.label_smoothing).backward()
        optimizer.step()
        if progress is not None:
            progress(step + 1, recipe.steps)
    return classifier.eval()


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
