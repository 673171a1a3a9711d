"""Reading and comparing the files of runs."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from dia_diffusion.io import KEY, verify_checksum, with_checksum
from dia_diffusion.training.run_folder import read_metrics

TIMES = {"images_per_second", "peak_memory_mib"}


def metrics(run: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(run / "metrics.jsonl")]


def weights(run: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def assert_same_tensors(one: Path, other: Path, step: int = 6) -> None:
    """Asserts that two runs' checkpoints at a step hold the same tensors, bit for bit."""
    files = [sorted((run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")) for run in (one, other)]
    assert [file.name for file in files[0]] == [file.name for file in files[1]] and files[0]
    for first, second in zip(*files, strict=True):
        a, b = load_file(first), load_file(second)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), first.name


def assert_same_run(one: Path, other: Path, step: int = 6) -> None:
    """Asserts that two runs have the same metrics, except times, and the same checkpoint, bit for bit."""
    assert metrics(one) == metrics(other)
    assert_same_tensors(one, other, step)


def cut_off(run: Path, step: int = 3) -> Path:
    """Removes the checkpoints after a step, as if the run had been killed before it wrote them."""
    for place in (run / "checkpoints").iterdir():
        if int(place.name.removeprefix("step-")) > step:
            shutil.rmtree(place)
    return run


def make_version_1(folder: Path) -> None:
    """Removes the version of randomness from all files of a folder; versions before 2 wrote none."""
    for name in ("state.json", "training.json", "trial.json"):
        for file in folder.rglob(name):
            before = json.loads(file.read_text())
            fields = verify_checksum(before)
            assert fields.pop("randomness") == 2
            file.write_text(json.dumps(with_checksum(fields) if KEY in before else fields))
