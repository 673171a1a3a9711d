"""Runs in unusual places: read-only, moved, and under names with spaces and non-Latin letters."""

import shutil
from pathlib import Path

import pytest

from dia_diffusion.cli.main import main
from dia_diffusion.evaluation.record import read_records
from tests.cli.one_line import error_of
from tests.faults.disks import read_only
from tests.training.run_files import assert_same_run


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIA_DIFFUSION_CACHE", str(tmp_path / "cache"))


def fid(run: Path, *options: object) -> list[object]:
    return ["fid", run, "--reference", "digits", "--num", "70", "--steps", "1", *options]


def succeeds(command: list[object]) -> None:
    assert main([str(part) for part in command]) == 0


def test_a_read_only_run_is_read_and_not_trained(
    trained: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    with read_only(tmp_path / "run") as run:
        error = error_of(["train", "--config", recipe, "--output", run, "--train.max_steps", "7"], capsys)
        assert f"output must be a folder that can be written and locked, got {run}: Read-only file system" in error
        succeeds(["sample", run, "--seeds", "0-3", "--steps", "1", "--out", tmp_path / "images"])
        error = error_of(["sample", run, "--seeds", "0-3", "--steps", "1", "--out", run / "images"], capsys, code=1)
        assert f"Read-only file system: {run}/images" in error
        for option, file in (("--grid", run / "grid.png"), ("--out", run / "images.npz")):
            error = error_of(["sample", run, "--seeds", "0-3", "--steps", "1", option, file], capsys)
            assert f"`{option}` must be a file that can be written, got {file}" in error
        error = error_of(fid(run), capsys)
        assert f"the records file must be a file that can be written, got {run}/evaluations.jsonl" in error
        succeeds(fid(run, "--record", tmp_path / "records.jsonl"))
        assert len(read_records(tmp_path / "records.jsonl")) == 1
        error = error_of(["report", run], capsys, code=1)
        assert f"Read-only file system: {run}/report.html" in error
        succeeds(["report", run, "--out", tmp_path / "report.html"])


def test_a_moved_run_resumes(trained: Path, recipe: Path, tmp_path: Path) -> None:
    train = ["train", "--config", recipe, "--train.checkpoint_every", "2", "--output"]
    succeeds([*train, tmp_path / "first", "--train.max_steps", "4"])
    moved = (tmp_path / "first").rename(tmp_path / "second place")
    succeeds([*train, moved])
    assert_same_run(moved, trained / "run")
    moved = moved.rename(tmp_path / "third")
    succeeds(["sample", moved, "--seeds", "0-3", "--steps", "1", "--out", tmp_path / "images"])
    succeeds(fid(moved))
    assert read_records(moved / "evaluations.jsonl")[0].step == 6
    succeeds(["report", moved])
    assert not (tmp_path / "first").exists() and not (tmp_path / "second place").exists()


def test_names_with_spaces_and_other_alphabets(recipe: Path, tmp_path: Path) -> None:
    place = tmp_path / "große Räume" / "画像 & 'co'"
    place.mkdir(parents=True)
    run, config = place / "läuf 1", place / "rezept ü.yaml"
    recipe.rename(config)
    succeeds(["train", "--config", config, "--output", run])
    succeeds(["train", "--config", config, "--output", run, "--train.max_steps", "7"])
    succeeds(["sample", run, "--seeds", "0-3", "--steps", "1", "--out", place / "bilder ø"])
    succeeds(["sample", run, "--seeds", "0-3", "--steps", "1", "--grid", place / "gitter ø.png"])
    succeeds(fid(run))
    succeeds(["report", run])
    (record,) = read_records(run / "evaluations.jsonl")
    assert record.run == "läuf 1" and record.step == 7
    assert "läuf 1" in (run / "report.html").read_text(encoding="utf-8")
