"""The recipe of the fault tests, and runs of it."""

from pathlib import Path

import pytest

from dia_diffusion.cli.main import main
from tests.evaluation.conftest import record
from tests.training import classify
from tests.training.conftest import TINY

__all__ = ["record"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    return file


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a diffusion run and a classification run of six steps each, with a checkpoint every two steps."""
    folder = tmp_path_factory.mktemp("damage")
    (folder / "tiny.yaml").write_text(TINY)
    recipe = ["--config", str(folder / "tiny.yaml"), "--output", str(folder / "run")]
    assert main(["train", *recipe, "--train.checkpoint_every", "2"]) == 0
    classify.train(classify.tiny(folder, "classifier", "--train.checkpoint_every", "2"))
    return folder
