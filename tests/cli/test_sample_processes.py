"""`sample` on two connected processes: which seeds each draws, and what happens where one of them fails."""

import errno
import os
from pathlib import Path

import pytest
import torch

from dia_diffusion.cli.main import main
from dia_diffusion.sampling import writers
from dia_diffusion.sampling.writers import missing_seeds, png_path, save_png
from tests.processes import on_two_processes
from tests.training.conftest import TINY


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TINY)
    assert main(["train", "--config", str(folder / "tiny.yaml"), "--output", str(folder / "run")]) == 0
    return folder / "run"


def sample(run: Path, out: Path, full_disk_of: int | None) -> tuple[int, list[int]]:
    """Draws the seeds 0 to 7 one by one; the exit code and the seeds that this process has drawn."""
    drawn = []

    def save(folder: Path, seed: int, image: torch.Tensor) -> None:
        if os.environ["RANK"] == str(full_disk_of):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(png_path(folder, seed)))
        save_png(folder, seed, image)
        drawn.append(seed)

    writers.save_png = save
    options = ["--seeds", "0-7", "--steps", "2", "--batch-size", "1", "--out", str(out)]
    return main(["sample", str(run), *options]), drawn


def test_the_missing_seeds_are_divided(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    assert main(["sample", str(run), "--seeds", "0,2,4,6", "--steps", "2", "--out", str(out)]) == 0
    assert missing_seeds(out, [7, 6, 3, 0]) == [7, 3]
    assert on_two_processes(sample, run, out, None) == [(0, [1, 5]), (0, [3, 7])]
    assert len(list(out.glob("*.png"))) == 8


def test_a_process_that_fails_ends_the_other_after_its_batch(run: Path, tmp_path: Path) -> None:
    assert on_two_processes(sample, run, tmp_path / "images", 1) == [(1, [0]), (1, [])]
