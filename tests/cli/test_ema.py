"""`ema`: pipelines of other averages, a sweep of widths, and refused input."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dia_diffusion.cli.main import main
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.record import read_records
from dia_diffusion.io import write_text
from dia_diffusion.training.snapshots import Snapshots
from tests.cli.one_line import error_of
from tests.training.conftest import TINY

pytestmark = pytest.mark.usefixtures("coarse_figures")
AVERAGES = ["--ema.power_widths", "[0.05, 0.1]", "--ema.snapshot_every", "1", "--ema.further_decays", "[0.5, 0.99]"]


@pytest.fixture(scope="module")
def with_snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ema")
    write_text(folder / "tiny.yaml", TINY)
    config = ["--config", str(folder / "tiny.yaml"), "--output", str(folder / "run"), "--train.max_steps", "20"]
    assert main(["train", *config, "--train.checkpoint_every", "10", *AVERAGES]) == 0
    return folder / "run"


@pytest.fixture
def averages(with_snapshots: Path, tmp_path: Path) -> Path:
    """A run of 20 steps with a snapshot of two widths after each step, and two further EMAs."""
    return Path(shutil.copytree(with_snapshots, tmp_path / "run"))


def test_a_pipeline_of_a_width(averages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["ema", str(averages), "--width", "0.08", "--out", str(out)]) == 0
    training = json.loads((out / "training.json").read_text())
    assert training["average"]["width"] == 0.08 and training["step"] == 20
    weights = [weight for kept in training["average"]["weights"].values() for weight in kept.values()]
    assert len(weights) == 40 and sum(weights) == pytest.approx(1)
    assert "power-function average of relative width 0.08" in (out / "README.md").read_text()
    assert main(["sample", str(out), "--seeds", "0-1", "--steps", "2", "--out", str(tmp_path / "images.npz")]) == 0
    before = (out / "unet" / "diffusion_pytorch_model.safetensors").stat()
    assert main(["ema", str(averages), "--width", "0.08", "--out", str(out)]) == 0
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").stat().st_ino == before.st_ino, "it isn't made again"
    line = error_of(["ema", averages, "--width", "0.09", "--out", out], capsys)
    assert f"{out} exists; choose another name, or remove it" in line


def test_a_tracked_width_and_a_decay_match_the_saved_averages(averages: Path) -> None:
    assert main(["ema", str(averages), "--width", "0.05", "--step", "10"]) == 0
    assert main(["ema", str(averages), "--decay", "0.5,0.99", "--step", "10"]) == 0
    made = averages / "averages" / "step-00000010"
    weights = "unet/diffusion_pytorch_model.safetensors"
    snapshot = load_file(averages / "snapshots" / "step-00000010" / "width-0.05.safetensors")
    for name, tensor in load_file(made / "width-0.05" / weights).items():
        assert (tensor - snapshot[name]).abs().max() < 1e-6
    kept = load_file(averages / "checkpoints" / "step-00000010" / "averages.safetensors")
    for name, tensor in load_file(made / "decay-0.99" / weights).items():
        assert tensor.equal(kept[f"decay-0.99/{name}"])
    assert "exponential moving average of decay 0.99" in (made / "decay-0.99" / "README.md").read_text()


def test_a_sweep_resumes(averages: Path, sampled: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    measuring = ["--reference", "digits", "--num", "20", "--steps", "2"]
    assert main(["ema", str(averages), "--width", "0.05,0.1", *measuring]) == 0
    assert len(sampled) == 40
    assert main(["ema", str(averages), "--width", "0.1,0.05,0.08", *measuring]) == 0
    assert len(sampled) == 60
    made = averages / "averages" / "step-00000020"
    points = json.loads((made / "widths.json").read_text())
    assert [point["width"] for point in points] == [0.05, 0.08, 0.1] and (made / "widths.png").is_file()
    (record,) = read_records(made / "width-0.08" / "evaluations.jsonl")
    assert record.distance == points[1]["distance"] and record.source == "run, width 0.08"
    assert "run, width 0.08" in capsys.readouterr().out
    assert main(["fid", str(made / "width-0.08"), *measuring]) == 0
    assert len(sampled) == 60, "fid finds the record"
    assert not (averages / "evaluations.jsonl").exists()


def test_a_width_of_large_weights_is_refused(with_snapshots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dia_diffusion.training.snapshots.MAX_AMPLIFICATION", 1.01)
    snapshots = Snapshots(with_snapshots)
    snapshots.check_width(0.1)  # a saved width: its one weight is 1
    with pytest.raises(InputError, match=r"got 0\.15, with absolute weights of sum \d+, above 1\.01"):
        snapshots.check_width(0.15)


def test_bad_input(averages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, measured = tmp_path / "plain", ["--reference", "digits"]
    shutil.copytree(averages, plain)
    shutil.rmtree(plain / "snapshots")
    shutil.rmtree(plain / "checkpoints")
    for arguments, line in (
        ([averages], "`--width` is missing, or `--decay`"),
        ([averages, "--width", "0.1", "--decay", "0.5"], "`--decay` must be left out when `--width` is given"),
        ([averages, "--width", "wide"], "each of `--width` must be a number, got 'wide'"),
        ([averages, "--width", "0.07,0.070"], "`--width` must be different numbers, got 0.07,0.07"),
        ([averages, "--decay", "0.5,0.5"], "`--decay` must be different numbers, got 0.5,0.5"),
        ([averages, "--width", "0.1", "--num", "80"], "`--num` must be left out without `--protocol` or `--reference`"),
        ([averages, "--width", "0.1", "--protocol", "none"], "a protocol must be a YAML file or one of"),
        ([tmp_path / "no", "--width", "0.1"], "`RUN` must be a run's folder, which has a config.yaml, got"),
        ([averages / "pipelines" / "step-00000020", "--decay", "0.5"], "step-00000020, a folder without one"),
        ([plain, "--width", "0.1"], "`RUN` must be a run trained with `ema.power_widths` and `ema.snapshot_every`"),
        ([averages, "--width", "0.07", "--reference", "/no"], "`--reference` must be images or a file of statistics"),
        ([averages, "--width", "0.07", *measured, "--guidance-scale", "2"], "guidance"),
        ([averages, "--width", "0.07", *measured, "--classes", "3"], "classes"),
        ([averages, "--decay", "0.5", *measured, "--sampler", "none"], "sampler"),
        ([averages, "--decay", "0.5", *measured, "--guide", "/no", "--guidance-scale", "2"], "/no"),
        ([plain, "--decay", "0.5"], "`RUN` must be a run with checkpoints"),
        ([averages, "--width", "0.1", "--step", "21"], "`--step` must be a step with a snapshot in"),
        ([averages, "--decay", "0.9"], "`--decay` must be among ema.further_decays"),
        ([averages, "--width", "0.005"], "`--width` must be from 0.0"),
        ([averages, "--width", "0.1,0.5"], "`--width` must be from 0.0"),
        ([averages, "--width", "0.005"], "got 0.005, with residual "),
        ([averages, "--width", "0"], "`--width` must be from 0.0"),
    ):
        assert line in error_of(["ema", *arguments], capsys)
    assert not (averages / "averages").exists()
    assert main(["ema", str(averages), "--width", "0.1", "--out", str(plain / "made")]) == 0
    (plain / "made" / "training.json").write_text("{")
    line = error_of(["ema", averages, "--width", "0.1", "--out", plain / "made"], capsys)
    assert "training.json is truncated or corrupted" in line
    lone = averages / "snapshots" / "step-00000020" / "width-0.1.safetensors"
    lone.write_bytes(lone.read_bytes()[:-1])
    assert f"snapshot file {lone} is truncated" in error_of(["ema", averages, "--width", "0.1"], capsys)
    (lone.parent / "state.json").write_text("{}")
    assert "state.json is missing, truncated or corrupted" in error_of(["ema", averages, "--width", "0.1"], capsys)
    assert main(["ema", str(averages), "--width", "0.1", "--step", "19"]) == 0, "those after the step don't count"


def test_fid_sweeps_widths_and_steps(averages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fid = ["fid", str(averages), "--reference", "digits", "--num", "20"]
    for options, message in (
        (["--reference", "/no"], "`--reference` must be images or a file of statistics"),
        (["--sampler", "none"], "sampler"),
        (["--sweep", "step=20,21"], "`--step` must be a step with a snapshot in"),
        (["--sweep", "guidance_scale=1,2"], "guidance"),
    ):
        assert message in error_of([*fid, *options, "--sweep", "width=0.05,0.1"], capsys)
    assert not (averages / "averages").exists()
    assert main([*fid, "--sweep", "width=0.05,0.1", "steps=2,3"]) == 0
    made = averages / "averages" / "step-00000020"
    (numbers,) = made.glob("sweep-width-steps-*.json")
    written = json.loads(numbers.read_text())
    distances = [record.distance for w in (0.05, 0.1) for record in read_records(made / f"width-{w}/evaluations.jsonl")]
    assert [point["distance"] for point in written["points"]] == distances and len(set(distances)) == 4
    assert written["points"][1]["settings"] == {"width": 0.05, "steps": 3}
    assert numbers.with_suffix(".png").is_file()
