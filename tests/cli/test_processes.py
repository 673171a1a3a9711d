"""`sample` and `fid` on two connected processes give what one gives."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dia_diffusion.cli.main import main
from dia_diffusion.evaluation.record import read_records
from tests.processes import start_connected


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

    # A folder that holds some of the images already is filled up, whoever made them.
    folder = tmp_path / "images"
    assert main(["sample", run, "--seeds", "4-6", "--steps", "4", "--out", str(folder)]) == 0
    launch("sample", run, "--seeds", "0-9", "--steps", "4", "--out", str(folder), logs=tmp_path)
    assert sorted(path.stem for path in folder.glob("*.png")) == [f"{seed:08d}" for seed in range(10)]

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
    """As on machines whose shared disk is slow: the main process decides, and nothing is measured again."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    fid = ["fid", str(made), "--reference", "digits", "--num", "70", "--steps", "2", "--record", "records.jsonl"]
    assert main(fid) == 0
    launch(*fid, logs=tmp_path, prepare=partial(second_process_in, tmp_path / "elsewhere"))
    assert len(read_records("records.jsonl")) == 1
