"""Sample grids of a run, as pictures that are part of the page."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import PIL.Image

from dia_diffusion.data.decode import read_file
from dia_diffusion.io import STEP_FOLDER
from dia_diffusion.report.page import Picture
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.run_folder import RunFolder

T = TypeVar("T")


def grid_files(run: Path) -> dict[int, Path]:
    """step -> PNG of the run's grids, in rising order."""
    files = {path: STEP_FOLDER.fullmatch(path.stem) for path in RunFolder(run).samples.glob("*.png")}
    return dict(sorted((int(match[1]), path) for path, match in files.items() if match))


def grid_picture(file: Path, step: int, name: str, experiment: Experiment, caption: str = "") -> Picture | None:
    """A grid that a run drew at a step; None for a file that is no picture."""
    try:
        content = read_file(file)
        with PIL.Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            size = picture.size
            picture.verify()
    except Exception:  # a corrupt file can raise almost anything inside a decoder
        return None
    count = experiment.samples.count
    return Picture(
        uri=f"data:image/png;base64,{base64.b64encode(content).decode()}",
        size=size,
        alternative=f"{count} samples of run {name} at step {step:,}, seeds 0-{count - 1}",
        caption=caption,
    )


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]
