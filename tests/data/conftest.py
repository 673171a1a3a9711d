"""Encoded images, and folders and zips of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.security.hostile import write_zip
from tests.security.hostile_images import encoded


def png(pixels: np.ndarray) -> bytes:
    return encoded(Image.fromarray(pixels))


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.fixture
def pixels() -> np.ndarray:
    """Six random RGB images, uint8 (6, 8, 8, 3)."""
    return np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(params=["folder", "zip"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    """Writes files into a folder or a zip, and returns its path."""
    if request.param == "zip":
        return lambda files: write_zip(tmp_path / "images.zip", files)
    return lambda files: write_folder(tmp_path / "images", files)
