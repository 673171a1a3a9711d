"""Two connected processes (gloo) train and test the classifier that one does; without norms, which see a part each."""

from pathlib import Path

import pytest

from dia_diffusion.training.run_folder import read_metrics
from tests.processes import start_connected
from tests.training.classify import tiny


def metrics(tmp_path: Path, processes: int, *overrides: str) -> list[dict]:
    output = tmp_path / str(processes)
    tiny(tmp_path, "run")
    command = ["classify", "--config", tmp_path / "classify.yaml", "--model.norm", "none", "--output", output]
    for process in start_connected(*command, *overrides, logs=tmp_path, processes=processes):
        assert process.wait() == 0, process.text()
    return read_metrics(output / "metrics.jsonl")


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    alone, together = metrics(tmp_path, 1), metrics(tmp_path, 2)
    assert len(alone) == len(together) == 8
    for one, two in zip(alone, together, strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {"images_per_second", "peak_memory_mib"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4), (key, one["step"])
