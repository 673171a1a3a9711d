"""The same training however it is split, wherever it was stopped, and each time it is run."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dia_diffusion.cli.main import main
from tests.training.conftest import TINY
from tests.training.run_files import metrics, weights


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_trains_the_same_in_float64(accumulation: int, in_float64, tiny, train, tmp_path: Path) -> None:
    train(tiny("whole"))
    train(tiny("parts", "--train.accumulation", str(accumulation)))
    for name in ("model", "ema"):
        whole, parts = weights(tmp_path / "whole", 6, name), weights(tmp_path / "parts", 6, name)
        assert max(float((whole[key] - parts[key]).abs().max()) for key in whole) < 1e-9
    expected = [line["loss"] for line in metrics(tmp_path / "whole")]
    assert [line["loss"] for line in metrics(tmp_path / "parts")] == pytest.approx(expected, rel=1e-9)


def test_a_run_goes_on_from_any_step_bit_for_bit(tiny, train, tmp_path: Path) -> None:
    each = ("--train.checkpoint_every", "1", "--train.keep_last", "9")
    train(tiny("whole", *each))
    for step in range(1, 6):
        cut = shutil.copytree(tmp_path / "whole", tmp_path / f"cut-{step}")
        for later in range(step + 1, 7):
            shutil.rmtree(cut / "checkpoints" / f"step-{later:08d}")
        train(tiny(cut.name, *each))
        assert metrics(cut) == metrics(tmp_path / "whole")
        for name in ("model", "ema", "optimizer"):
            whole, parts = weights(tmp_path / "whole", 6, name), weights(cut, 6, name)
            assert all(torch.equal(whole[key], parts[key]) for key in whole), f"from step {step}"


def test_the_same_commands_twice_leave_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        train = ["train", "--config", "../tiny.yaml", "--output", "run", "--train.sample_every", "3"]
        assert main([*train, "--samples.count", "4", "--samples.steps", "3"]) == 0
        assert main(["sample", "run", "--seeds", "0-4", "--steps", "3", "--out", "images"]) == 0
        assert main(["sample", "run", "--seeds", "0-4", "--steps", "3", "--out", "images.npz"]) == 0
        assert main(["fid", "run", "--reference", "digits", "--num", "70", "--steps", "2"]) == 0
    first, second = (
        {str(file.relative_to(place)): file for file in place.rglob("*") if file.is_file()}
        for place in (tmp_path / "first", tmp_path / "second")
    )
    assert first.keys() == second.keys() and any(name.endswith(".png") for name in first)
    differing = {name for name in first if first[name].read_bytes() != second[name].read_bytes()}
    assert differing <= {"run/metrics.jsonl", "run/evaluations.jsonl", "run/.lock"}
    assert metrics(tmp_path / "first" / "run") == metrics(tmp_path / "second" / "run")
    records = [
        json.loads((tmp_path / place / "run" / "evaluations.jsonl").read_text()) for place in ("first", "second")
    ]
    assert {key for key in records[0] if records[0][key] != records[1][key]} <= {"seconds", "time", "crc32"}
