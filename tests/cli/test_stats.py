"""`dia-diffusion stats`, and `fid` against the files it writes."""

from pathlib import Path

import numpy as np
import pytest

from dia_diffusion.cli.main import main
from dia_diffusion.data import open_images
from dia_diffusion.evaluation.frechet import FeatureStatistics
from dia_diffusion.evaluation.record import read_records
from tests.cli.one_line import error_of


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIA_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_make_show_compare_and_measure(capsys: pytest.CaptureFixture[str]) -> None:
    """Statistics and the images they were made from give the same distance under the same protocol."""
    assert main(["stats", "make", "digits", "test.safetensors", "--split", "test"]) == 0
    assert main(["stats", "make", "digits", "train.safetensors", "--num", "300", "--seed", "1"]) == 0
    capsys.readouterr()
    assert main(["stats", "show", "test.safetensors"]) == 0
    shown = capsys.readouterr().out
    for expected in ("596 images", "64 features", "3x8x8", "norm of the mean", "trace of the covariance", "created"):
        assert expected in shown
    assert main(["stats", "compare", "test.safetensors", "train.safetensors"]) == 0
    assert "FD(digits): " in capsys.readouterr().out

    measure = ["fid", "digits", "--num", "300", "--reference"]
    assert main([*measure, "test.safetensors", "--record", "file.jsonl"]) == 0
    assert main([*measure, "digits", "--reference-split", "test", "--record", "images.jsonl"]) == 0
    (file,), (images,) = read_records("file.jsonl"), read_records("images.jsonl")
    assert file.distance == pytest.approx(images.distance, rel=1e-12) and file.protocol == images.protocol


def test_features_default_to_those_of_the_statistics_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "make", "digits", "digits.safetensors"]) == 0
    assert main(["fid", "digits", "--split", "test", "--reference", "digits.safetensors", "--record", "r.jsonl"]) == 0
    (record,) = read_records("r.jsonl")
    assert (record.metric, record.split, record.protocol.reference_split) == ("FD(digits)", "test", "train")
    statistics, provenance = FeatureStatistics.load("digits.safetensors")
    statistics.save("other.safetensors", {**provenance, "features": "my:Module"})
    fid = ["fid", "digits", "--reference", "other.safetensors"]
    assert "in features my:Module; name them with --features" in error_of(fid, capsys)


def test_a_source_without_parts_is_recorded_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = open_images("digits", split="test").images.transpose(0, 2, 3, 1)
    np.save("test.npy", images)
    assert main(["stats", "make", "test.npy", "test.safetensors", "--features", "digits"]) == 0
    assert main(["stats", "show", "test.safetensors"]) == 0
    assert "train" not in capsys.readouterr().out
    for reference in ("test.npy", "test.safetensors"):
        fid = ["fid", "test.npy", "--features", "digits", "--num", "100", "--reference", reference]
        assert main([*fid, "--record", f"{reference}.jsonl"]) == 0
        (record,) = read_records(f"{reference}.jsonl")
        assert record.split is record.protocol.reference_split is None
    assert "train" not in capsys.readouterr().out


def test_another_programs_npz(capsys: pytest.CaptureFixture[str]) -> None:
    """Only its moments are known; the record and the printed table leave the rest unknown."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(200, 64))
    np.savez("moments.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    np.savez("features.npz", pool_3=features)
    assert main(["stats", "show", "moments.npz"]) == 0
    assert "unknown" in capsys.readouterr().out
    assert main(["stats", "compare", "moments.npz", "features.npz"]) == 0
    out = capsys.readouterr().out
    assert float(out.split("Frechet distance: ")[1].split()[0]) < 1e-9 and "FID" not in out
    for name in ("moments.npz", "features.npz"):
        fid = ["fid", "digits", "--features", "digits", "--num", "100", "--reference", name]
        assert main([*fid, "--record", "r.jsonl"]) == 0
    moments, known = read_records("r.jsonl")
    assert (moments.protocol.reference_count, known.protocol.reference_count) == (None, 200)
    assert moments.protocol.reference_split is None and moments.protocol.reference_shape is None
    assert moments.distance == pytest.approx(known.distance, rel=1e-9)


def test_nothing_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.safetensors").write_text("mine")
    assert "exists already" in error_of(["stats", "make", "digits", "mine.safetensors"], capsys)
    assert (tmp_path / "mine.safetensors").read_text() == "mine"
    assert main(["stats", "make", "digits", "test.safetensors", "--split", "test"]) == 0
    split = ["fid", "digits", "--num", "50", "--reference-split", "test", "--reference"]
    assert main(["stats", "make", "digits", "train.safetensors"]) == 0
    assert "train.safetensors, train" in error_of([*split, "train.safetensors"], capsys)
    split[split.index("test")] = "train"
    assert "test.safetensors, test" in error_of([*split, "test.safetensors"], capsys)
    np.savez("moments.npz", mu=np.zeros(64), sigma=np.eye(64))
    assert "which is not recorded" in error_of([*split, "moments.npz", "--features", "digits"], capsys)
    assert not list(tmp_path.glob("*.jsonl"))
