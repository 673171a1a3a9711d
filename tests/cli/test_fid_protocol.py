"""`fid --protocol`: the settings it fixes, the records that count for it, and the options it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dia_diffusion.cli.fid_options import check_features
from dia_diffusion.cli.main import main
from dia_diffusion.data import open_images
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import read_records
from dia_diffusion.io import shipped_names
from tests.cli.one_line import error_of

SETTINGS = "{features: digits, num_samples: 80, sampler: ddim, steps: 2, reference_split: test, reference_count: 596}"
OPTIONS = ["--features", "digits", "--num", "80", "--sampler", "ddim", "--steps", "2", "--reference-split", "test"]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user-defined protocol."""
    (tmp_path / "mine.yaml").write_text(SETTINGS)
    return tmp_path / "mine.yaml"


def test_help_lists_the_shipped_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fid", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in shipped_names("protocols"))


def test_a_protocol_equals_its_options(
    run: Path, mine: Path, sampled: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference defaults to the run's training data. Recorded images aren't sampled again for another name."""
    assert main(["fid", str(run), "--reference", "digits", *OPTIONS]) == 0
    capsys.readouterr()
    named = ["fid", str(run), "--protocol", str(mine)]
    assert main(named) == main([*named, "--reference", "digits"]) == 0
    assert "mine " in capsys.readouterr().out
    assert len(sampled) == 80
    plain, record = read_records(run / "evaluations.jsonl")
    protocol = EvalProtocol.read(str(mine))
    assert record == replace(plain, protocol_name="mine", protocol_file_hash=protocol.hash())
    assert record.protocol.dtype == "float32"

    again = shutil.copy(mine, tmp_path / "again.yaml")
    assert main(["fid", str(run), "--protocol", str(again)]) == 0
    assert main(["fid", str(run), "--reference", "digits", *OPTIONS]) == 0
    assert main([*named, "--every-step"]) == 0
    records = read_records(run / "evaluations.jsonl")
    assert [(each.step, each.protocol_name) for each in records] == [(6, None), (6, "mine"), (6, "again"), (3, "mine")]
    assert len(sampled) == 160
    assert main([*named, "--metrics", "prc"]) == main(named) == 0
    assert read_records(run / "evaluations.jsonl")[4].protocol_name == "mine"
    card = (run / "pipelines" / "step-00000003" / "README.md").read_text()
    assert f"| FD(digits) | {records[3].distance:.3f} | 80 | digits (test) | ddim | 2 | mine |" in card


def test_a_changed_protocol_and_a_record_cut_short(
    run: Path, mine: Path, sampled: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    named, records = ["fid", run, "--protocol", mine], run / "evaluations.jsonl"
    assert main([str(argument) for argument in named]) == 0
    before, content = EvalProtocol.read(str(mine)).hash()[:8], records.read_text()
    mine.write_text(SETTINGS.replace("steps: 2", "steps: 3"))
    assert f"mine with other settings (hash {before}, now" in error_of([*named, "--every-step"], capsys)
    mine.write_text(SETTINGS)
    records.write_text(content[:-30])
    assert "line 1: not a complete evaluation record" in error_of(named, capsys)
    assert "line 1: not a complete evaluation record" in error_of(["curves", run], capsys)
    assert records.read_text() == content[:-30] and len(sampled) == 80


def test_what_it_refuses(
    run: Path, mine: Path, tmp_path: Path, sampled: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    named = ["fid", run, "--protocol", mine]
    for option, value, decided in (
        ("--num", "80", "80"),
        ("--features", "cifar10", "digits"),
        ("--sampler", "ddpm", "ddim"),
        ("--steps", "50", "2"),  # the option's default
        ("--precision", "bfloat16", "float32"),
        ("--classes", "1", "all"),
        ("--guidance-scale", "2.0", "1.0"),
        ("--reference-split", "train", "test"),
    ):
        assert f"{option} {value}: protocol mine says {decided}; leave it out" in error_of(
            [*named, option, value], capsys
        )
    mine.write_text(SETTINGS.replace("596", "1201"))
    assert "must have 1,201 images for protocol mine, got 596" in error_of(named, capsys)
    mine.write_text(SETTINGS)
    np.savez(tmp_path / "m.npz", mu=np.zeros(64), sigma=np.eye(64))
    unknown = error_of([*named, "--reference", tmp_path / "m.npz"], capsys)
    assert "`reference_split` of protocol mine" in unknown and "which is not recorded" in unknown
    few = error_of(["fid", "digits", "--reference", "digits", "--protocol", "fd2k-dpm25"], capsys)
    assert "`num_samples` of protocol fd2k-dpm25 must be 1201 or less" in few

    pipeline = run / "pipelines" / "step-00000006"
    training = json.loads((pipeline / "training.json").read_text())
    gone = {**training, "recipe": {**training["recipe"], "data": {"source": "photos.zip"}}}
    (pipeline / "training.json").write_text(json.dumps(gone))
    assert "was trained on photos.zip, which isn't here; give --reference" in error_of(named, capsys)
    (pipeline / "training.json").write_text(json.dumps({**training, "weights": "raw"}))
    assert "holds raw weights; protocol mine measures ema" in error_of(named, capsys)
    (pipeline / "training.json").unlink()
    assert "doesn't say what it was trained on; give --reference" in error_of(named, capsys)
    assert not sampled and not (run / "evaluations.jsonl").exists()


def test_inception_with_other_weights_is_refused() -> None:
    options: Any = SimpleNamespace(weights_file="w.pth")
    protocol = EvalProtocol.read("fid10k-dpm50")
    check_features(options, protocol, "inception")
    said = r"features inception for protocol fid10k-dpm50, got w\.pth, which give inception-1a2b3c4d"
    with pytest.raises(InputError, match=said):
        check_features(options, protocol, "inception-1a2b3c4d")


def test_image_sources_use_only_the_settings_that_apply(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a floor: features, number of images and reference. A file of statistics gives the same record."""
    monkeypatch.setenv("DIA_DIFFUSION_CACHE", str(tmp_path / "cache"))
    statistics, records = tmp_path / "test.safetensors", tmp_path / "r.jsonl"
    assert main(["stats", "make", "digits", str(statistics), "--split", "test"]) == 0
    fid = ["fid", "digits", "--protocol", str(mine), "--record", str(records), "--reference"]
    assert main([*fid, "digits"]) == main([*fid, str(statistics)]) == 0
    (record,) = read_records(records)
    assert (record.protocol_name, record.protocol.num_samples) == ("mine", 80)
    assert record.protocol.reference_count == 596 and record.protocol.sampler is None


def test_statistics_of_images_without_splits_count_as_train(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A source without splits opens as split `train`; its statistics do the same."""
    np.save(tmp_path / "a.npy", open_images("digits", split="test", channels=1).images.transpose(0, 2, 3, 1))
    protocol = tmp_path / "train.yaml"
    protocol.write_text(SETTINGS.replace("reference_split: test", "reference_split: train"))
    made = ["stats", "make", str(tmp_path / "a.npy"), str(tmp_path / "a.safetensors"), "--features", "digits"]
    assert main([*made, "--size", "8", "--channels", "1"]) == 0
    for reference in ("a.npy", "a.safetensors"):
        assert main(["fid", str(run), "--protocol", str(protocol), "--reference", str(tmp_path / reference)]) == 0
    assert len(read_records(run / "evaluations.jsonl")) == 1
