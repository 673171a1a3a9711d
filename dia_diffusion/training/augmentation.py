"""Augmentations for classification as functions of uniform random numbers, one row per image."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dia_diffusion.distributed import sent
from dia_diffusion.training.randomness import AUGMENT, image_order, uniforms

BORDER = 4
"""Width in pixels of the border that "pad-crop" adds."""
GRAY = 127
"""Pixel value of a cutout."""
AREAS = 0.08, 1.0
"""Range of the fraction of an image's area that "resized-crop" takes."""
ASPECTS = 3 / 4, 4 / 3
"""Range of its width over height."""
TRIES = 10
"""Tries to find a rectangle that fits into the image, as in torchvision's RandomResizedCrop."""

MIRROR, DOWN, RIGHT, FIRST_TRY = range(4)
HIDE_DOWN, HIDE_RIGHT = FIRST_TRY + 2 * TRIES, FIRST_TRY + 2 * TRIES + 1
NUM_UNIFORM = HIDE_RIGHT + 1
"""Columns of the uniform numbers: mirroring (if below one half), position, area and aspect of each try, and the
position of the cutout."""


@dataclass(frozen=True)
class ImageDraws:
    """The random numbers of one step, for the images of the global batch or a slice of it."""

    indices: np.ndarray  # (B,) int64, which images
    uniform: Tensor  # (B, 25) float32 in [0, 1)
    pixels: np.ndarray | None = None  # (B, 3, size, size) uint8, crops that "resized-crop" reads from files

    def slice(self, start: int, stop: int) -> "ImageDraws":
        """The draws of images start..stop."""
        part = slice(start, stop)
        pixels = None if self.pixels is None else self.pixels[part]
        return ImageDraws(self.indices[part], self.uniform[part], pixels)


def draw_images(
    seed: int, step: int, batch_size: int, num_images: int, start: int = 0, stop: int | None = None
) -> ImageDraws:
    """The draws of images start..stop (None: to the end) of the global batch of a step, counted from 0."""
    first, count = step * batch_size + start, (batch_size if stop is None else stop) - start
    uniform = uniforms(seed, AUGMENT, first, count, NUM_UNIFORM)
    return ImageDraws(image_order(seed, first, count, num_images), uniform)


def mirrored(images: Tensor, uniform: Tensor) -> Tensor:
    """Images (B, C, H, W), some mirrored according to the draws."""
    return torch.where(sent(uniform[:, MIRROR] < 0.5, images.device)[:, None, None, None], images.flip(-1), images)


def pad_cropped(images: Tensor, uniform: Tensor, reflected: bool = False) -> Tensor:
    """Images (B, C, H, W), each shifted by up to BORDER pixels either way; the border is black or reflected."""
    height, width = images.shape[2:]
    padded = F.pad(images.float(), [BORDER] * 4, mode="reflect" if reflected else "constant").to(images.dtype)
    shifts = sent((uniform[:, [DOWN, RIGHT]] * (2 * BORDER + 1)).long(), images.device)  # (B, 2)
    rows = shifts[:, :1] + torch.arange(height, device=images.device)  # (B, H)
    columns = shifts[:, 1:] + torch.arange(width, device=images.device)  # (B, W)
    batch = torch.arange(len(images), device=images.device)
    # Advanced indices around a slice move the channels last: (B, H, W, C).
    return padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cut_out(images: Tensor, uniform: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W), uint8, each with a gray square of this size at a random pixel (DeVries and Taylor 2017)."""
    hidden = []  # (B, H), (B, W)
    for column, extent in zip((HIDE_DOWN, HIDE_RIGHT), images.shape[2:], strict=True):
        first = (uniform[:, column, None] * extent).long() - size // 2
        place = torch.arange(extent)
        hidden.append((first <= place) & (place < first + size))
    square = hidden[0][:, None, :, None] & hidden[1][:, None, None, :]  # (B, 1, H, W)
    return images.masked_fill(sent(square, images.device), GRAY)


def crop_box(width: int, height: int, uniform: Tensor) -> tuple[float, float, float, float]:
    """The rectangle (left, top, right, bottom) that "resized-crop" takes, given an image's row of draws.

    The first that fits of TRIES rectangles with uniform area and log-uniform aspect, else the largest centered one with
    an aspect in range.
    """
    shortest, longest = map(math.log, ASPECTS)
    for area, aspect in uniform[FIRST_TRY:HIDE_DOWN].reshape(TRIES, 2).tolist():
        target = (AREAS[0] + (AREAS[1] - AREAS[0]) * area) * width * height
        ratio = math.exp(shortest + (longest - shortest) * aspect)
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = (int(float(uniform[k]) * (space + 1)) for k, space in ((DOWN, height - h), (RIGHT, width - w)))
            return left, top, left + w, top + h
    w, h = min(width, round(height * ASPECTS[1])), min(height, round(width / ASPECTS[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resized_crop(image: Image.Image, size: int, uniform: Tensor) -> np.ndarray:
    """The `crop_box` of an image, resized to uint8 (3, size, size)."""
    box = crop_box(image.width, image.height, uniform)
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box)).transpose(2, 0, 1)
