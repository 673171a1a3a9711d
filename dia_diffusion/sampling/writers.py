"""Generated images as files: PNGs named by seed, one npz, or a grid to look at."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dia_diffusion.errors import InputError
from dia_diffusion.io import atomic_file, write_json
from dia_diffusion.reading import Unreadable, read_json

MANIFEST = "samples.json"
SEPARATOR = 96  # gray between a grid's images, visible next to both white and black


def png_path(folder: str | Path, seed: int) -> Path:
    """The path of a seed's image; the seed has at least eight digits, so that names sort in order of seed."""
    return Path(folder) / f"{seed:08d}.png"


def open_folder(folder: str | Path, protocol: dict[str, Any]) -> None:
    """Creates a folder for the images of one protocol (model, sampler, steps, labels, ...), or resumes it.

    The protocol, any JSON, is stored in the folder as samples.json. This guarantees that existing images (see
    `png_path`) are identical to those that would be generated. Several processes may call this at the same time.

    Raises:
        InputError: the folder contains other files, or images of another protocol.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} must be a new folder, or one with images of the same protocol, got a file")
    if not manifest.exists():
        if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise InputError(f"{folder} must be new, empty, or have a {MANIFEST}, got other files")
        write_json(manifest, protocol)
        return
    try:
        kept = read_json(manifest)
    except Unreadable:
        raise InputError(f"{manifest} is not JSON; choose another folder") from None
    wanted = json.loads(json.dumps(protocol))
    if not isinstance(kept, dict) or kept != wanted:
        kept = kept if isinstance(kept, dict) else {}
        different = sorted(key for key in kept.keys() | wanted.keys() if kept.get(key) != wanted.get(key))
        raise InputError(
            f"{folder} holds images with other settings ({', '.join(different)} in {MANIFEST}); choose another folder"
        )


def missing_seeds(folder: str | Path, seeds: Sequence[int]) -> list[int]:
    """The seeds without an image in the folder, in the given order."""
    present = {path.name for path in Path(folder).iterdir()}
    return [seed for seed in seeds if png_path(folder, seed).name not in present]


def save_png(folder: str | Path, seed: int, image: Tensor) -> None:
    """Writes the image of a seed, uint8 (C, H, W) with 1 or 3 channels, atomically as a PNG file."""
    with atomic_file(png_path(folder, seed)) as temporary:
        _to_pil(image).save(temporary, format="PNG")


def save_npz(path: str | Path, seeds: Sequence[int], images: Tensor) -> None:
    """Writes `images` uint8 (N, C, H, W) as one file, in order of seed: `images` (N, H, W, C) and `seeds` (N,) int64.

    Raises InputError: the file exists.
    """
    if Path(path).exists():
        raise InputError(f"{path} exists; choose another name, or remove it")
    order = sorted(range(len(seeds)), key=lambda index: seeds[index])
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            images=images[order].permute(0, 2, 3, 1).contiguous().numpy(),
            seeds=np.array([seeds[index] for index in order], dtype=np.int64),
        )


def save_grid(images: Tensor, path: str | Path, columns: int | None = None, min_size: int = 512) -> None:
    """Writes a PNG of images side by side, in rows, for a person to look at.

    Args:
        images: uint8 (N, C, H, W) with 1 or 3 channels.
        path: of the PNG file.
        columns: images per row; None makes the grid about square.
        min_size: small images are enlarged by repeating pixels until the grid is about this wide.
    """
    if len(images) == 0:
        raise InputError("a grid needs at least one image")
    count, channels, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    scale = max(1, round(min_size / (columns * width)))
    gap = max(2, scale)  # as wide as one enlarged pixel
    large = images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    height, width = scale * height, scale * width
    grid = torch.full(
        (channels, rows * (height + gap) - gap, columns * (width + gap) - gap), SEPARATOR, dtype=torch.uint8
    )
    for index, image in enumerate(large):
        row, column = divmod(index, columns)
        top, left = row * (height + gap), column * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    with atomic_file(path) as temporary:
        _to_pil(grid).save(temporary, format="PNG")


def _to_pil(image: Tensor) -> Image.Image:
    if image.shape[0] not in (1, 3):
        raise InputError(f"a PNG must have 1 or 3 channels, got {image.shape[0]}")
    array = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[:, :, 0] if image.shape[0] == 1 else array)
