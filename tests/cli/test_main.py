"""The command line as a user sees it: each outcome is a line and an exit code."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dia_diffusion import __version__
from dia_diffusion.cli.curves import floor_of
from dia_diffusion.cli.main import COMMANDS, main
from dia_diffusion.evaluation.record import read_records
from tests.cli.one_line import error_of

pytestmark = pytest.mark.usefixtures("coarse_figures")
ROOT = Path(__file__).parents[2]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"dia-diffusion {__version__}"
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in COMMANDS)
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "cifar10_uvit_s2_dia" in shown and "--optimizer.learning_rate" in shown
    assert main(["classify", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "dia-diffusion classify" in shown and "cifar100_resnet," in shown and "--data.augmentation" in shown


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"train", "classify"}))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"dia-diffusion {name}" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["train/train.py", "sample/sample.py", "eval/fid.py"])
def test_scripts_are_the_commands(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launchers run these scripts."""
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert ended.value.code == 0
    assert f"dia-diffusion {Path(script).stem}" in capsys.readouterr().out


def test_train_sample_fid_curves(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, out, npz = tmp_path / "grid.png", tmp_path / "images", tmp_path / "images.npz"
    few = ["--steps", "5", "--batch-size", "3"]
    assert main(["sample", str(run), "--seeds", "0-4,9", *few, "--grid", str(grid), "--out", str(out)]) == 0
    assert sorted(p.name for p in out.glob("*.png")) == [f"{seed:08d}.png" for seed in (0, 1, 2, 3, 4, 9)]
    assert Image.open(grid).size[0] > 100
    pipeline = run / "pipelines" / "step-00000006"
    assert main(["sample", str(pipeline), "--seeds", "9,4", "--steps", "5", "--out", str(npz)]) == 0
    arrays = np.load(npz)
    assert arrays["seeds"].tolist() == [4, 9]
    for seed, image in zip((4, 9), arrays["images"], strict=True):
        png = np.asarray(Image.open(out / f"{seed:08d}.png")).astype(int)
        assert np.abs(png - image[..., 0]).max() <= 1

    reference = ["--reference", "digits", "--reference-split", "test"]
    assert main(["fid", str(run), *reference, "--num", "80", "--steps", "3", "--every-step"]) == 0
    records = read_records(run / "evaluations.jsonl")
    assert [record.step for record in records] == [3, 6]
    assert {record.metric for record in records} == {"FD(digits)"}
    assert (records[0].unit, records[0].batch_size, records[0].images_seen) == ("dia-lstm", 8, 24)
    assert main(["fid", str(run), *reference, "--num", "80", "--steps", "3", "--every-step"]) == 0
    assert len(read_records(run / "evaluations.jsonl")) == 2, "what is on record is not measured again"
    assert f"{records[1].distance:.3f}" in (pipeline / "README.md").read_text()

    figure = tmp_path / "curve.png"
    assert main(["curves", str(run), "--out", str(figure), "--floor", "1.0"]) == 0
    assert Image.open(figure).size[0] > 100
    points = json.loads((tmp_path / "curve.json").read_text())
    assert [point["step"] for point in points] == [3, 6]

    floor = tmp_path / "floor.jsonl"
    real = ["fid", "digits", "--size", "8", "--channels", "1", *reference, "--record", str(floor)]
    assert main([*real, "--num", "70"]) == 0
    drawn = ["curves", str(run), "--out", str(figure), "--floor", str(floor)]
    assert "num_samples 70 there, 80 here" in error_of(drawn, capsys)
    assert main([*real, "--num", "80"]) == 0
    assert main(drawn) == 0
    assert floor_of(str(floor), records[0]) == read_records(floor)[1].distance
    samples = error_of([*drawn[:-1], run / "evaluations.jsonl"], capsys)
    assert "only samples" in samples

    assert main(["fid", str(run), *reference, "--num", "70", "--steps", "3"]) == 0
    assert "num_samples 80 vs. 70" in error_of(["curves", run, "--out", figure], capsys)
    chosen = records[0].protocol_hash()[:12]
    assert main(["curves", str(run), "--out", str(figure), "--protocol", chosen]) == 0


def test_sampling_resumes_in_its_folder_and_refuses_others(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "images"
    assert main(["sample", str(run), "--seeds", "0-2", "--steps", "2", "--out", str(out)]) == 0
    first = (out / "00000001.png").stat().st_mtime_ns
    assert main(["sample", str(run), "--seeds", "1-4", "--steps", "2", "--out", str(out)]) == 0
    assert len(list(out.glob("*.png"))) == 5 and (out / "00000001.png").stat().st_mtime_ns == first
    assert "images with other settings (steps in " in error_of(["sample", run, "--steps", "3", "--out", out], capsys)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "must be new, empty, or have a samples.json" in error_of(
        ["sample", run, "--steps", "2", "--out", tmp_path / "mine"], capsys
    )
