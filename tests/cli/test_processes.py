"""`sample` and `fid` on two connected processes: the results of one process, and both end if one fails."""

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dia_diffusion.cli.main import main
from dia_diffusion.evaluation.record import read_records
from dia_diffusion.sampling import writers
from dia_diffusion.sampling.writers import missing_seeds, png_path, save_png
from tests.processes import on_two_processes, start_connected


def launch(*command: str, logs: Path, prepare: Callable[[], object] | None = None) -> None:
    for process in start_connected(*command, logs=logs, prepare=prepare):
        assert process.wait() == 0, process.text()


def test_two_processes_sample_and_measure_as_one(made: Path, tmp_path: Path) -> None:
    run = str(made)
    sample = ["sample", run, "--seeds", "3-9", "--steps", "4", "--sampler", "dpmsolver++sde", "--out"]
    assert main([*sample, str(tmp_path / "one.npz")]) == 0
    launch(*sample, str(tmp_path / "two.npz"), logs=tmp_path)
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert one["seeds"].tolist() == two["seeds"].tolist() == list(range(3, 10))
    assert np.abs(one["images"].astype(int) - two["images"]).max() <= 1

    record = str(tmp_path / "records.jsonl")
    fid = ["fid", run, "--reference", "digits", "--num", "81", "--steps", "3", "--record"]
    assert main([*fid, record]) == 0
    launch(*fid, str(tmp_path / "two.jsonl"), logs=tmp_path)
    (one_record,), (two_record,) = read_records(record), read_records(tmp_path / "two.jsonl")
    assert one_record.protocol == two_record.protocol
    assert two_record.distance == pytest.approx(one_record.distance, rel=1e-6)


def second_process_in(folder: Path) -> None:
    if os.environ["RANK"] == "1":
        os.chdir(folder)


def test_records_that_one_process_does_not_see_yet(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a slow shared disk: the main process decides, and nothing is measured again."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    fid = ["fid", str(made), "--reference", "digits", "--num", "70", "--steps", "2", "--record", "records.jsonl"]
    assert main(fid) == 0
    launch(*fid, logs=tmp_path, prepare=partial(second_process_in, tmp_path / "elsewhere"))
    assert len(read_records("records.jsonl")) == 1


def sample(run: Path, out: Path, full_disk_of: int | None) -> tuple[int, list[int]]:
    """Draws seeds 0 to 7 one by one; returns the exit code and the seeds drawn by this process."""
    drawn = []

    def save(folder: Path, seed: int, image: torch.Tensor) -> None:
        if os.environ["RANK"] == str(full_disk_of):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(png_path(folder, seed)))
        save_png(folder, seed, image)
        drawn.append(seed)

    writers.save_png = save
    options = ["--seeds", "0-7", "--steps", "2", "--batch-size", "1", "--out", str(out)]
    return main(["sample", str(run), *options]), drawn


def test_the_missing_seeds_are_divided(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    assert main(["sample", str(made), "--seeds", "0,2,4,6", "--steps", "2", "--out", str(out)]) == 0
    assert missing_seeds(out, [7, 6, 3, 0]) == [7, 3]
    assert on_two_processes(sample, made, out, None) == [(0, [1, 5]), (0, [3, 7])]
    assert len(list(out.glob("*.png"))) == 8


def test_a_process_that_fails_ends_the_other_after_its_batch(made: Path, tmp_path: Path) -> None:
    assert on_two_processes(sample, made, tmp_path / "images", 1) == [(1, [0]), (1, [])]
