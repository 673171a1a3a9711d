"""Training of the classifier of CIFAR-10."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from dia_diffusion.evaluation.features.cifar10 import Cifar10Classifier


@dataclass(frozen=True)
class Cifar10Recipe:
    """SGD with Nesterov momentum, its rate rising and falling linearly, on images mirrored, shifted and cut out of."""

    steps: int = 8000
    batch_size: int = 256
    learning_rate: float = 0.2
    warmup_steps: int = 1000
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    max_shift: int = 4
    """In pixels; what comes in at the border mirrors the image."""
    cutout: int = 8
    """Height and width of a grey square that hides a part of each image (DeVries and Taylor 2017)."""


def fit_cifar10(
    images: np.ndarray,
    labels: np.ndarray,
    recipe: Cifar10Recipe,
    *,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Cifar10Classifier:
    """A classifier fitted to uint8 images (N, 3, 32, 32) and int64 labels (N,), on a GPU where there is one.

    `seed` fixes what is random; the weights repeat to the bit on one machine with one number of threads.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Cifar10Classifier()
    classifier.to(device).to(memory_format=torch.channels_last)
    inputs, targets = torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.SGD(
        classifier.parameters(), momentum=recipe.momentum, nesterov=True, weight_decay=recipe.weight_decay
    )
    for step in range(recipe.steps):
        chosen = torch.from_numpy(_batch(len(inputs), recipe.batch_size, step, seed))
        rising = (step + 1) / recipe.warmup_steps
        falling = (recipe.steps - step) / max(1, recipe.steps - recipe.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(rising, falling)
        batch = _augment(inputs[chosen], recipe, generator).to(device).float() / 255
        with torch.autocast(device, torch.bfloat16):
            _, logits = classifier(batch)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), targets[chosen].to(device), label_smoothing=recipe.label_smoothing).backward()
        optimizer.step()
        if progress is not None:
            progress(step + 1, recipe.steps)
    return classifier.cpu().to(memory_format=torch.contiguous_format).eval()


def _batch(count: int, size: int, step: int, seed: int) -> np.ndarray:
    """The indices of a step: every pass over the images has an order of its own, and leaves out what fills no batch."""
    steps_a_pass = max(1, count // size)
    order = np.random.default_rng([seed, step // steps_a_pass]).permutation(count)
    start = step % steps_a_pass * size
    return order[start : start + size]


def _augment(images: torch.Tensor, recipe: Cifar10Recipe, generator: torch.Generator) -> torch.Tensor:
    """Each image (B, 3, H, W) mirrored with probability one half, shifted, and in part hidden, by its own draws."""
    batch, _, height, width = images.shape
    reach = recipe.max_shift
    padded = F.pad(images.float(), (reach, reach, reach, reach), mode="reflect").to(images.dtype)
    shift = torch.randint(2 * reach + 1, (2, batch, 1), generator=generator)
    rows, columns = shift[0] + torch.arange(height), shift[1] + torch.arange(width)  # (B, H), (B, W)
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    moved = padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)
    centre = torch.stack([torch.randint(size, (batch, 1), generator=generator) for size in (height, width)])
    inside = [
        (torch.arange(size) - at + recipe.cutout // 2) % (2 * size) < recipe.cutout
        for size, at in zip((height, width), centre, strict=True)
    ]  # (B, H), (B, W)
    hidden = inside[0][:, :, None, None] & inside[1][:, None, :, None]
    return moved.masked_fill(hidden, 127).permute(0, 3, 1, 2)
