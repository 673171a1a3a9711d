"""`fid` killed in mid-run, and the metrics that it computes in addition to the distance."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dia_diffusion.cli.main import main
from dia_diffusion.evaluation.record import read_records
from dia_diffusion.pipelines.folder import records_file
from tests.cli.one_line import error_of
from tests.processes import Forked, hold_evaluation

COLORS = "tests.evaluation.colors:Colors"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIA_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def finished(run: Path) -> int:
    """The number of finished chunks of 500 images in the unfinished work."""
    return len(list(run.glob("evaluations.unfinished/*/chunk-*.safetensors")))


def test_a_killed_fid_resumes_to_the_same_distance(
    run: Path, tmp_path: Path, sampled: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    fid = [str(run), "--reference", "digits", "--num", "1000", "--steps", "2"]
    process = Forked("fid", *fid, log=tmp_path / "log", prepare=partial(hold_evaluation, 1))
    process.until(lambda: finished(run) == 1)
    process.kill()
    assert not (run / "evaluations.jsonl").exists()

    assert main(["fid", *fid]) == 0
    assert sampled == list(range(500, 1000))
    assert "resuming after 500 of 1,000 images" in capsys.readouterr().out
    assert not (run / "evaluations.unfinished").exists()
    assert main(["fid", *fid, "--record", str(tmp_path / "whole.jsonl")]) == 0
    assert read_records(run / "evaluations.jsonl")[0].distance == read_records(tmp_path / "whole.jsonl")[0].distance


def test_recorded_images_are_measured_again_only_for_other_metrics(
    run: Path, sampled: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    fid = ["fid", str(run), "--reference", "digits", "--num", "120", "--steps", "2"]
    more = ["--metrics", "fid,kid,isc,prc", "--kid-subset-size", "50", "--bootstrap", "20"]
    expected = 0
    for arguments, measures in (
        (fid, True),
        ([*fid, *more], True),
        ([*fid, *more], False),
        (fid, False),
        ([*fid, "--metrics", "prc"], False),
        ([*fid, "--bootstrap", "30"], True),
    ):
        assert main(arguments) == 0
        expected += 120 * measures
        assert len(sampled) == expected, arguments
    first, second, third = read_records(run / "evaluations.jsonl")
    assert first.distance == second.distance == third.distance
    assert first.protocol_hash() == second.protocol_hash() == third.protocol_hash()
    assert second.metrics.keys() >= {"KD(digits)", "IS(digits)", "precision(digits)", "recall(digits)"}
    shown = capsys.readouterr().out
    assert f"{second.distance:.3f} [{second.low:.3f}, {second.high:.3f}]" in shown
    assert f"{second.metrics['KD(digits)']:.4f} ± {second.metrics['KD(digits) std']:.4f}" in shown
    card = (run / "pipelines" / "step-00000006" / "README.md").read_text()
    assert card.count("| FD(digits) |") == 1


def test_records_of_a_pipeline_right_below_the_root() -> None:
    assert records_file(Path("/model")) == Path("/model/evaluations.jsonl")


def test_only_the_requested_metrics_are_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fid = ["fid", str(run), "--reference", "digits", "--num", "80", "--steps", "2"]
    assert main([*fid, "--step", "3", "--metrics", "isc,prc"]) == 0
    capsys.readouterr()
    assert main([*fid, "--every-step"]) == 0  # the newer pipeline has no other metrics
    assert "IS(digits)" not in capsys.readouterr().out
    assert main([*fid, "--every-step", "--metrics", "prc"]) == 0
    shown = capsys.readouterr().out
    assert "precision(digits)" in shown and "IS(digits)" not in shown


def test_images_on_record_are_not_measured_again(capsys: pytest.CaptureFixture[str]) -> None:
    fid = ["fid", "digits", "--reference", "digits", "--num", "50"]
    assert main(fid) == main(fid) == 0
    assert "50 samples for 64 features: their covariance is singular" in capsys.readouterr().out
    assert len(read_records("evaluations.jsonl")) == 1
    assert main([*fid, "--metrics", "prc"]) == 0
    assert len(read_records("evaluations.jsonl")) == 2


def test_an_interrupt_reports_what_is_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dia_diffusion.evaluation.evaluate.filled_stores", interrupted)
    assert main(["fid", "digits", "--reference", "digits", "--num", "100"]) == 130
    assert "nothing is kept" in capsys.readouterr().err


def test_the_same_weights_in_another_model_are_not_on_record(run: Path, sampled: list[int]) -> None:
    fid = ["fid", str(run), "--reference", "digits", "--num", "80", "--steps", "2"]
    assert main(fid) == main(fid) == 0
    assert len(sampled) == 80
    config = run / "pipelines" / "step-00000006" / "unet" / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"num_attention_heads": 2 * fields["num_attention_heads"]}))
    assert main(fid) == 0
    assert len(sampled) == 160
    first, second = read_records(run / "evaluations.jsonl")
    assert first.weights_hash == second.weights_hash and first.protocol_hash() == second.protocol_hash()
    assert first.distance != second.distance


def test_one_image_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "one", tmp_path / "one.safetensors"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    for arguments in (["fid", folder, "--reference", "digits"], ["stats", "make", folder, out, "--features", "digits"]):
        assert "one must have 2 images or more, got 1" in error_of(arguments, capsys)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_statistics_are_no_reference_for_kid(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.npz").write_bytes(b"")
    fid = ["fid", run, "--features", "digits", "--reference", tmp_path / "s.npz", "--metrics", "prc"]
    assert "`--reference` must be images for prc, got" in error_of(fid, capsys)


def test_distances_relative_to_held_out_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real images from the held-out split are as good as the held-out images: a relative distance of 1."""
    fid = ["fid", "digits", "--split", "test", "--reference", "digits", "--metrics", "fdr"]
    assert main([*fid, "--features", f"digits,{COLORS}", "--num", "596"]) == 0
    printed = capsys.readouterr().out
    assert "FDr^2" in printed and "1.0000 [1.0000, 1.0000]" in printed
    digits, colors = read_records(tmp_path / "evaluations.jsonl")
    assert digits.metrics["FDr(digits)"] == pytest.approx(1) and colors.metrics[f"FDr({COLORS})"] == pytest.approx(1)
    assert digits.metric_settings["fdr"]["held_out"] == "digits, test"
    assert main([*fid, "--features", "digits", "--num", "596"]) == 0
    assert len(read_records(tmp_path / "evaluations.jsonl")) == 2  # already on record
    refused = {
        "must be 596 or less for metric fdr": ["--split", "train", "--num", "600"],
        "must be given for metric fdr: the reference nothing.npz holds statistics": ["--reference", "nothing.npz"],
        "must be other images than the reference": ["--held-out", "digits"],
    }
    np.savez("nothing.npz", mu=np.zeros(64), sigma=np.eye(64))
    for text, options in refused.items():
        assert text in error_of([*fid, "--features", "digits", *options], capsys)
