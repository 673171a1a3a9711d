"""A disk that fills up during a write, here a small in-memory disk."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

from dia_diffusion.cli.main import main
from dia_diffusion.evaluation.record import append_record, read_records
from dia_diffusion.training.checkpoint import check_checkpoint
from tests.cli.one_line import error_of
from tests.faults.disks import fill, small_disk
from tests.faults.harness import checkpoints, leftovers
from tests.training.run_files import assert_same_run

LEFT = r"\(it takes [\d.]+ kB, and [\d.]+ (kB|bytes) are free\)"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "4m") as place:
        yield place


def test_no_room_for_a_checkpoint(
    disk: Path, trained: Path, recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = disk / "run"
    command = ["train", "--config", str(recipe), "--output", str(run), "--train.checkpoint_every", "2"]
    assert main([*command, "--train.max_steps", "4"]) == 0

    def half(*args: object) -> None:
        save_file(*args)
        fill(disk)  # by another program

    with monkeypatch.context() as patch:
        patch.setattr("dia_diffusion.training.checkpoint.save_file", half)
        error = error_of(command, capsys, code=1)
    assert re.search(rf"No space left on device {LEFT}: {run}/checkpoints/step-00000006$", error.strip()), error
    assert checkpoints(run) == [2, 4] and not leftovers(run)
    check_checkpoint(run / "checkpoints" / "step-00000004")

    (disk / "filler").unlink()
    fill(disk, leave=200_000)  # enough for the pipeline, not for the checkpoint
    error = error_of(command, capsys, code=1)
    assert re.search(rf"No space left on device {LEFT}: {run}/checkpoints/step-00000006$", error.strip()), error
    assert checkpoints(run) == [2, 4] and not leftovers(run)

    (disk / "filler").unlink()
    assert main(command) == 0
    assert_same_run(run, trained / "run")


def test_no_room_for_samples(disk: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = ["sample", trained / "run", "--seeds", "0-199", "--steps", "1"]
    folder = disk / "images"
    filler = fill(disk, leave=100_000)
    error = error_of([*sample, "--out", folder], capsys, code=1)
    made = sorted(folder.glob("*.png"))
    assert re.search(rf"No space left on device \(.* are free\): {folder}/\d+.png$", error.strip()), error
    assert 0 < len(made) < 200 and not leftovers(folder)
    before = {file: file.read_bytes() for file in made}
    error = error_of([*sample, "--out", disk / "images.npz"], capsys, code=1)
    assert re.search(rf"No space left on device \(.* are free\): {disk}/images.npz$", error.strip()), error
    filler.unlink()
    assert main([*map(str, sample), "--out", str(folder)]) == 0
    assert len(list(folder.glob("*.png"))) == 200 and {file: file.read_bytes() for file in made} == before


def test_no_room_for_a_record(
    disk: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIA_DIFFUSION_CACHE", str(tmp_path / "cache"))
    run = Path(shutil.copytree(trained / "run", disk / "run"))
    fid = ["fid", str(run), "--reference", "digits", "--steps", "1"]
    assert main([*fid, "--num", "70"]) == 0

    def full(*args: object) -> None:
        fill(disk)
        append_record(*args)

    with monkeypatch.context() as patch:
        patch.setattr("dia_diffusion.evaluation.evaluate.append_record", full)
        while (run / "evaluations.jsonl").stat().st_size % 4096 < 3000:  # so that the next record needs a new page
            append_record(run / "evaluations.jsonl", read_records(run / "evaluations.jsonl")[0])
        before = (run / "evaluations.jsonl").read_bytes()
        error = error_of([*fid, "--num", "71"], capsys, code=1)
    assert re.search(rf"No space left on device {LEFT}: {run}/evaluations.jsonl$", error.strip()), error
    assert (run / "evaluations.jsonl").read_bytes() == before
    error = error_of([*fid, "--num", "72"], capsys, code=1)
    assert re.search(r"No space left on device \(.* are free\): .*evaluations.unfinished", error), error

    (disk / "filler").unlink()
    monkeypatch.delattr("dia_diffusion.evaluation.feature_store.FeatureStore.write")  # all features are already on disk
    assert main([*fid, "--num", "71"]) == 0
    assert read_records(run / "evaluations.jsonl")[-1].protocol.num_samples == 71
