"""A finished tiny run for each unit that a test asks for."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dia_diffusion.training.loop import Trainer
from dia_diffusion.training.recipe import read_experiment
from tests.training.conftest import TINY, Recorder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_run("dia-lstm") is the folder of a run with pipelines of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("analysis")
    (folder / "tiny.yaml").write_text(TINY)

    def make(unit: str) -> Path:
        if not (folder / unit).exists():
            overrides = ["--output", str(folder / unit), "--model.attention", unit, "--optimizer.learning_rate", "0.05"]
            Trainer(read_experiment(str(folder / "tiny.yaml"), overrides), Recorder()).run()
        return folder / unit

    return make
