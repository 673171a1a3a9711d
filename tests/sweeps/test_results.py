import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg

from dia_diffusion.data import open_images
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import build_features
from dia_diffusion.evaluation.record import append_record
from dia_diffusion.evaluation.reference import reference_statistics
from dia_diffusion.sweeps.collect import measured, scan, training_seconds
from dia_diffusion.sweeps.results import floor_of, results_of, write_results
from dia_diffusion.sweeps.sweep import read_study
from dia_diffusion.training.run_folder import RunFolder
from tests.sweeps.measured_studies import a_record, add_metrics, add_records, make_study, points_of


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIA_DIFFUSION_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def extractor():
    return build_features("digits")


def distance(run, step):
    return 3 + 600 / step + 0.1 * run.seed - (run.unit == "dia-lstm") * (1 + 0.01 * run.seed**2)


def test_writes_figures_points_and_tables(tmp_path):
    study = make_study(tmp_path, final=True)
    add_records(study, distance)
    add_records(study, lambda run, step: distance(run, step) - 1, protocol="end")
    add_metrics(study, lambda run: 60)
    written = write_results(results_of(scan(study)))
    assert [path.name for path in written] == ["curves.png", "final.png", "results.json", "results.md"]
    assert all(path.parent == study.folder for path in written)
    assert Image.open(written[0]).format == Image.open(written[1]).format == "PNG"

    found = json.loads((study.folder / "results.json").read_text())
    assert len(found["points"]) == 36
    (point,) = (p for p in found["points"] if (p["run"], p["step"]) == ("dia-lstm-b32-s1", 400))
    assert point.pop("distance") == pytest.approx(3 + 1.5 + 0.1 - 1.01)
    named = {"unit": "dia-lstm", "batch_size": 32, "seed": 1, "step": 400, "run": "dia-lstm-b32-s1"}
    assert point == named | {"images_seen": 12_800, "low": None, "high": None}
    assert len(found["final_points"]) == 12
    assert {p["step"] for p in found["final_points"]} == {600}
    assert (found["protocol"]["name"], found["protocol"]["samples"]) == ("curve", 596)
    assert (found["final_protocol"]["name"], found["final_protocol"]["samples"]) == ("end", 1000)
    assert found["protocol"]["settings"]["num_inference_steps"] == 25
    assert "isn't the reference" in found["protocol"]["floor"]["missing"]
    assert found["runs_trained"] == found["runs_planned"] == 12
    assert found["seconds"] == {"training": 720, "measuring": 60}  # 12 runs of a minute, 48 records of 1.25 s
    assert found["summary"][0]["final"]["mean"] == pytest.approx(3.1)

    text = (study.folder / "results.md").read_text()
    assert "Final FD(digits), 1,000 samples (end), best and along the curve FD(digits), 596 samples (curve)" in text
    assert "| 8 | none | 3 | 4,800 | 3.100 ± 0.248 | 4.100 ± 0.248 | 4.850 ± 0.248 | 60 s | - | 1,500 MiB |" in text
    assert "for the study's 2 and 2 tests" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables[:6]}) == 1


def test_final_distances_are_the_curves_until_the_final_protocol_is_used(tmp_path):
    study = make_study(tmp_path, final=True, seeds=[0])
    add_records(study, distance)
    results = results_of(scan(study))
    assert results.final.protocol == "curve"
    assert "Nothing is measured by the final protocol end yet." in results.notes
    assert "0 of 4 runs are trained." in results.notes


def test_only_the_newest_record_under_the_protocols_name_counts(tmp_path):
    study = make_study(tmp_path, seeds=[0], units=["none"], batch_sizes=[8])
    add_records(study, distance)
    (run,) = study.runs
    append_record(RunFolder(run.folder).evaluations, a_record(run, 600, 99, sampler="ddpm"))
    add_records(study, lambda run, step: 1.5 if step == 400 else None)
    assert [(point.step, point.distance) for point in points_of(study)] == [(200, 6), (400, 1.5), (600, 4)]


def test_a_variant_has_the_name_that_the_study_gives_it(tmp_path):
    wide = {"model.attention": "dia-lstm", "model.attention_kwargs": {"reduction": 2}}
    study = make_study(tmp_path, units=["none", "wide"], seeds=[0], variants={"wide": wide})
    add_records(study, distance)
    assert {point.unit for point in points_of(study)} == {"none", "wide"}


def test_nothing_on_record_is_bad_input(tmp_path):
    study = make_study(tmp_path, seeds=[0], batch_sizes=[8])
    with pytest.raises(InputError, match=r"no evaluations by protocol curve yet"):
        write_results(results_of(scan(study)))
    assert not study.folder.exists()


def test_a_changed_protocol_is_refused(tmp_path):
    study = make_study(tmp_path, seeds=[0], batch_sizes=[8])
    add_records(study, distance)
    file = tmp_path / "curve.yaml"
    file.write_text(file.read_text().replace("steps: 25", "steps: 50"))
    with pytest.raises(InputError, match="other settings"):
        points_of(read_study(str(tmp_path / "tiny.yaml")))


def test_other_reference_images_under_one_name_are_refused(tmp_path):
    study = make_study(tmp_path, seeds=[0])
    add_records(study, lambda run, step: distance(run, step) if run.unit == "none" else None)
    add_records(study, lambda run, step: distance(run, step) if run.unit != "none" else None, reference_hash="a" * 64)
    with pytest.raises(InputError, match=r"none-b8-s0 .* dia-lstm-b8-s0 .*: reference_hash e+ vs. a+"):
        points_of(study)


@pytest.mark.parametrize(("units", "seeds"), [(["none"], [0, 1]), (["none", "se"], [0])])
def test_records_of_another_run_are_refused(units, seeds, tmp_path):
    study = make_study(tmp_path, seeds=seeds, units=units, batch_sizes=[8])
    add_records(study, distance)
    first, second = (RunFolder(run.folder).evaluations for run in study.runs)
    second.write_bytes(first.read_bytes())
    own = f"8, {seeds[-1]} and {units[-1]}"
    with pytest.raises(InputError, match=f"batch size 8, seed 0 and unit none; the study's run has {own}"):
        points_of(study)


def frechet(first, second):
    """Frechet distance of features (N, D), with scipy's matrix square root."""
    covariances = [np.cov(rows, rowvar=False) for rows in (first, second)]
    root = linalg.sqrtm(covariances[0] @ covariances[1])
    gap = first.mean(0) - second.mean(0)
    return gap @ gap + np.trace(covariances[0] + covariances[1]) - 2 * np.trace(root).real


def features(extractor, images):
    return extractor(torch.from_numpy(images.copy())).double().numpy()


def measured_against(study, extractor, images, **changes):
    """Adds records measured against these images to the study; returns the first."""
    reference = reference_statistics(images, extractor)
    hashes = {"reference_hash": reference.hash, "features_hash": extractor.weights_hash}
    add_records(study, distance, **hashes, **changes)
    return measured(study.runs, study.protocol)[0].record


def test_the_floor_uses_as_many_images_of_the_other_split_and_is_measured_once(tmp_path, extractor, monkeypatch):
    study = make_study(tmp_path, seeds=[0], batch_sizes=[8])
    held_out, training = (open_images("digits", size=8, channels=1, split=split) for split in ("test", "train"))
    record = measured_against(study, extractor, held_out)
    chosen = np.random.default_rng(0).permutation(len(training))[:596]
    expected = frechet(features(extractor, training.images[chosen]), features(extractor, held_out.images))
    results = results_of(scan(study))
    floor = results.curve.floor
    assert floor.distance == pytest.approx(expected, rel=1e-5)
    assert floor.images == "596 of the train split"
    write_results(results)
    written = json.loads((study.folder / "results.json").read_text())["protocol"]["floor"]
    assert written == dataclasses.asdict(floor)
    monkeypatch.setattr("dia_diffusion.sweeps.results.floor_of", lambda *_: pytest.fail("measured again"))
    assert results_of(scan(study)).curve.floor == floor
    monkeypatch.undo()

    real = dataclasses.replace(record, distance=0.75, protocol=dataclasses.replace(record.protocol, seeds=None))
    append_record(study.folder / "floor.jsonl", real)
    assert results_of(scan(study)).curve.floor_distance == 0.75, "a recorded one counts"


def test_without_splits_the_floor_compares_some_images_with_the_others(tmp_path, extractor):
    pixels = open_images("digits", size=8, channels=1, split="train").images
    np.save(tmp_path / "images.npy", np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)))
    study = make_study(tmp_path, seeds=[0], batch_sizes=[8], reference=str(tmp_path / "images.npy"))
    images = open_images(tmp_path / "images.npy", size=8, channels=1)
    record = measured_against(study, extractor, images, reference="images.npy", reference_split=None)
    order = np.random.default_rng(0).permutation(len(images))
    rows = features(extractor, images.images)
    assert floor_of(study, record).distance == pytest.approx(frechet(rows[order[:596]], rows[order[596:]]), rel=1e-5)
    many = dataclasses.replace(record, protocol=dataclasses.replace(record.protocol, num_samples=800))
    with pytest.raises(InputError, match="must have twice the 800 samples"):
        floor_of(study, many)


def test_no_floor_is_measured_in_other_features(tmp_path):
    study = make_study(tmp_path, seeds=[0], batch_sizes=[8])
    add_records(study, distance, features="inception")
    results = results_of(scan(study))
    assert results.curve.floor_distance is None
    assert any("aren't measured in features inception while drawing" in note for note in results.notes)


def test_a_line_without_a_rate_leaves_its_images_to_the_next() -> None:
    """A distance measured during training adds such a line between two logged ones."""
    lines = [{"images": 10, "images_per_second": 10.0}, {"images": 15}, {"images": 20, "images_per_second": 10.0}]
    assert training_seconds(lines) == 2.0
