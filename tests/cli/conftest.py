"""A tiny run to measure, and the fixtures for pipelines that are exported and sent."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from dia_diffusion.cli.main import main
from dia_diffusion.sampling.generate import SharedLoop
from tests.pipelines.conftest import hub, save
from tests.processes import children
from tests.training.conftest import TINY

__all__ = ["children", "hub", "save"]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TINY)
    assert main(["train", "--config", str(folder / "tiny.yaml"), "--output", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of the tiny recipe without records, with the recipe next to it and its own cache."""
    monkeypatch.setenv("DIA_DIFFUSION_CACHE", str(tmp_path / "cache"))
    shutil.copy(made.parent / "tiny.yaml", tmp_path)
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that have been sampled, in order."""
    seeds: list[int] = []
    draw = SharedLoop.draw

    def counted(self: SharedLoop, batch: list[int], *args: Any) -> Any:
        seeds.extend(batch)
        return draw(self, batch, *args)

    monkeypatch.setattr(SharedLoop, "draw", counted)
    return seeds
