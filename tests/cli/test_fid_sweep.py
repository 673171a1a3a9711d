"""`fid --sweep`: a grid of settings with one record per point."""

import json
from pathlib import Path

import pytest

from dia_diffusion.cli.main import main
from dia_diffusion.evaluation.record import read_records
from tests.cli.one_line import error_of

pytestmark = pytest.mark.usefixtures("coarse_figures")


def test_a_grid_is_measured_once(run: Path, sampled: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers equal those of single measurements, and images are drawn once for both features."""
    features = ["--features", "digits,tests.evaluation.colors:Colors"]
    fid = ["fid", str(run), "--reference", "digits", "--num", "40", *features]
    assert main([*fid, "--steps", "3", "--sampler", "ddim"]) == 0
    assert len(sampled) == 40
    sweep = [*fid, "--bootstrap", "10", "--sweep", "steps=3,2", "--sweep", "sampler=ddim,dpmsolver++"]
    assert main(sweep) == 0
    assert len(sampled) == 40 * 5
    capsys.readouterr()
    assert main(sweep) == 0
    assert len(sampled) == 40 * 5, "all points are on record"
    shown = capsys.readouterr().out

    records = read_records(run / "evaluations.jsonl")
    assert len(records) == 2 + 8
    assert [record.distance for record in records[2:4]] == [record.distance for record in records[:2]]
    digits = [record for record in records[2:] if record.metric == "FD(digits)"]
    places = [(record.protocol.num_inference_steps, record.protocol.sampler) for record in digits]
    assert places == [(3, "ddim"), (3, "dpmsolver++"), (2, "ddim"), (2, "dpmsolver++")]
    best = min(digits, key=lambda record: record.distance)
    at = f"steps {best.protocol.num_inference_steps}, sampler {best.protocol.sampler}"
    assert f"best FD(digits): {best.distance:.3f} [{best.low:.3f}, {best.high:.3f}] at {at}" in shown

    (numbers,) = run.glob("sweep-steps-sampler-*.json")  # the same for the same sweep
    assert numbers.with_suffix(".png").stat().st_size > 1000
    written = json.loads(numbers.read_text())
    assert written["sweep"] == {"steps": [3, 2], "sampler": ["ddim", "dpmsolver++"]}
    assert [point["distance"] for point in written["points"]][:4] == [record.distance for record in digits]
    assert written["points"][1]["settings"] == {"steps": 3, "sampler": "dpmsolver++"}
    assert written["best"][0]["distance"] == best.distance


def test_a_sweep_of_a_named_protocol_and_of_steps_of_training(run: Path, tmp_path: Path) -> None:
    """Points that change no setting keep the protocol's name."""
    protocol = tmp_path / "mine.yaml"
    protocol.write_text("{features: digits, num_samples: 40, sampler: ddim, steps: 2}")
    assert main(["fid", str(run), "--protocol", str(protocol), "--sweep", "steps=2,1", "step=3,6"]) == 0
    records = read_records(run / "evaluations.jsonl")
    assert [(record.step, record.protocol.num_inference_steps, record.protocol_name) for record in records] == [
        (3, 2, "mine"),
        (3, 1, "mine with steps=1"),
        (6, 2, "mine"),
        (6, 1, "mine with steps=1"),
    ]
    (numbers,) = run.glob("sweep-steps-step-*.json")
    written = json.loads(numbers.read_text())
    assert [point["settings"] for point in written["points"]] == [
        {"steps": 2, "step": 3},
        {"steps": 1, "step": 3},
        {"steps": 2, "step": 6},
        {"steps": 1, "step": 6},
    ]
    assert [point["step"] for point in written["points"]] == [3, 3, 6, 6]


def test_what_cannot_be_swept(run: Path, sampled: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        ("steps", "must be KEY=VALUE,VALUE,..., got steps"),
        ("seed=1,2", "must set one of sampler, steps, guidance_scale"),
        ("steps=2 steps=3", "got steps twice"),
        ("steps=2,2", "must have each value once, got 2 twice"),
        ("steps=2,0", "`--steps` must be"),
        ("steps=2,many", "`--steps` must be"),
        ("steps=2,2000", "must be 1 to 1000"),
        ("sampler=ddim,none", "must be one of"),
        ("guidance_scale=1,1.5", "must be 1 for an unconditional model"),
        ("guidance_interval=none,0.3:5", "must be left out for guidance_scale 1"),
        ("steps=2,3 --steps 4", "--steps 4: --sweep steps=2,3 sets it"),
        ("steps=2,3 --every-step", "must be left out when"),
        ("step=3,4", "must be one of 3, 6, got 4"),
        ("width=0.1,wide", "must have numbers, got 'wide'"),
        ("step=3,1e3", "must have whole numbers, got '1e3'"),
        ("width=0.1 decay=0.9", "must be left out when"),
    ):
        fid = ["fid", run, "--reference", "digits", "--num", "40", "--sweep", *options.split()]
        assert message in error_of(fid, capsys)
    assert not sampled and not (run / "evaluations.jsonl").exists()


def test_images_have_no_settings(capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["fid", "digits", "--reference", "digits", "--sweep", "steps=2,3"]
    assert "--sweep steps=2,3: digits is neither a pipeline nor a run; leave it out" in error_of(sweep, capsys)
