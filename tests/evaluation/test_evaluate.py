import json
import os
from dataclasses import replace
from multiprocessing import get_context
from threading import Event, Thread

import pytest
import torch
import torch_fidelity
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from dia_diffusion.cli.main import main
from dia_diffusion.data import open_images
from dia_diffusion.errors import InputError, RunError
from dia_diffusion.evaluation import feature_store
from dia_diffusion.evaluation.evaluate import Evaluator, discard_work, few_images_warnings, measure_together
from dia_diffusion.evaluation.feature_store import filled_store, open_store
from dia_diffusion.evaluation.features import build_features
from dia_diffusion.evaluation.metrics import METRICS, Metric
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import Origin, read_records
from dia_diffusion.evaluation.reference import reference_features, reference_statistics
from dia_diffusion.evaluation.sources import MeasuredImages
from dia_diffusion.progress import Progress
from tests.evaluation.torch_images import Images
from tests.processes import PATIENCE, free_port

ORIGIN = Origin(source="runs/a", unit="none", step=7, images_seen=224)
SAMPLED_BY = [
    "seeds",
    "sampler",
    "scheduler",
    "num_inference_steps",
    "class_labels",
    "guidance_scale",
    "weights",
    "dtype",
]


def asking(**extras):
    return EvalProtocol(features="digits", num_samples=2, sampler="ddim", steps=1, **extras)


PLAIN = asking()
ORDERED = asking(bootstrap=10)
"""Bootstrap intervals depend on the order of the images, unlike distances: resample k chooses by index."""
ALL = asking(metrics=["fid", "kid", "isc", "prc"], kid_subset_size=200, bootstrap=20)


@pytest.fixture(scope="module")
def train():
    return torch.from_numpy(open_images("digits", split="train").images[:300])


@pytest.fixture(scope="module")
def many():
    """2,402 images: four chunks."""
    return torch.from_numpy(open_images("digits", split="train").images).repeat(2, 1, 1, 1)


def source_of(images_of, count, protocol):
    sampled_by = {name: getattr(protocol(), name) for name in SAMPLED_BY}
    return MeasuredImages("images", ORIGIN, count, images_of, sampled_by)


def in_batches(images, batch, asked=None, fail_at=None):
    """Yields the images of given indices; `asked` collects the indices, and `fail_at` raises KeyboardInterrupt."""

    def images_of(indices, advance):
        for start in range(0, len(indices), batch):
            part = list(indices[start : start + batch])
            if fail_at is not None and part[-1] >= fail_at:
                raise KeyboardInterrupt
            if asked is not None:
                asked.extend(part)
            yield images[[index for index in part if index < len(images)]]

    return images_of


@pytest.fixture
def run(extractor, digits, protocol):
    """Evaluates a tensor of images."""
    reference = reference_statistics(digits, extractor)

    def evaluate_images(images, batch=64, asked=None, fail_at=None, extras=PLAIN, features=None, work=None, count=None):
        source = source_of(in_batches(images, batch, asked, fail_at), count or len(images), protocol)
        evaluator = Evaluator(extras, extractor, replace(reference, features=features), Accelerator(cpu=True))
        return measure_together([evaluator], source, [work])[0]

    return evaluate_images


def test_distance_matches_torch_fidelity_and_the_record_holds_the_settings(extractor, train, digits, protocol, run):
    found = run(train)
    features = [extractor(images).double() for images in (train, torch.from_numpy(digits.images))]
    statistics = [fid_features_to_statistics(each) for each in features]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert found.distance == pytest.approx(expected, rel=1e-6)
    assert (found.metric, found.source, found.unit, found.step) == ("FD(digits)", "runs/a", "none", 7)
    expected = protocol(num_samples=300, reference_count=596)
    left = {"features_hash", "reference_hash"}
    assert found.protocol.differences(expected).keys() == left
    assert found.protocol.features_hash == extractor.weights_hash
    assert found.seconds > 0
    assert found.low is None and found.metrics == {} == found.metric_settings


def test_every_metric_matches_torch_fidelity(extractor, train, digits, run):
    features = reference_features(digits, extractor, Accelerator(cpu=True))
    found = run(train, extras=ALL, features=features)
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(train),
        input2=Images(digits.images),
        feature_extractor="digits",
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        kid_subset_size=200,
        cuda=False,
        cache=False,
        save_cpu_ram=True,  # no worker processes
        verbose=False,
        batch_size=50,
    )
    assert found.distance == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    names = {
        "KD(digits)": "kernel_inception_distance_mean",
        "KD(digits) std": "kernel_inception_distance_std",
        "IS(digits)": "inception_score_mean",
        "IS(digits) std": "inception_score_std",
        "precision(digits)": "precision",
        "recall(digits)": "recall",
        "f_score(digits)": "f_score",
    }
    assert found.metrics == {
        ours: pytest.approx(theirs[their_name], rel=1e-4, abs=1e-5) for ours, their_name in names.items()
    }
    assert found.low < found.distance < found.high
    assert found.metric_settings.keys() == {"kid", "isc", "prc", "bootstrap"}
    assert found.protocol_hash() == run(train).protocol_hash()


def test_reference_features_are_cached(extractor, digits, own_cache, monkeypatch):
    expected = extractor(torch.from_numpy(digits.images))
    features = reference_features(digits, extractor, Accelerator(cpu=True))
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(type(extractor), "layers", None)  # fails if anything is measured again
    assert torch.equal(reference_features(digits, extractor, Accelerator(cpu=True)), features)


@pytest.mark.parametrize("extras", [PLAIN, asking(metrics=["isc"])])
def test_a_stopped_measurement_resumes_to_the_same_number(many, run, tmp_path, extras):
    whole = run(many, extras=extras)
    asked = []
    with pytest.raises(KeyboardInterrupt):
        run(many, extras=extras, work=tmp_path / "work", fail_at=1900, asked=asked)
    first = sorted(asked)
    asked.clear()
    found = run(many, extras=extras, work=tmp_path / "work", asked=asked)
    assert (found.distance, found.metrics) == (whole.distance, whole.metrics)
    assert len(first) > 1801 and sorted(asked) == list(range(1801, 2402))  # only the last of four chunks
    asked.clear()
    assert run(many, extras=extras, work=tmp_path / "work", asked=asked).distance == whole.distance
    assert asked == []


def test_damaged_chunks_are_measured_again(many, run, tmp_path):
    work, asked = tmp_path / "work", []
    whole = run(many, work=work).distance
    files = sorted(work.glob("chunk-*.safetensors"))
    last, content = files[-1], files[-1].read_bytes()
    damages = (
        lambda: last.write_bytes(content[:-100] + bytes(100)),
        lambda: last.write_bytes(content[:5000]),
        lambda: last.write_bytes(b""),
        last.unlink,
        lambda: last.write_bytes(files[0].read_bytes()),  # a valid chunk of another length
    )
    for damage in damages:
        damage()
        asked.clear()
        assert run(many, work=work, asked=asked).distance == whole
        assert sorted(asked) == list(range(1801, 2402))


def test_the_work_folder_is_next_to_the_records_and_depends_on_the_settings(protocol, tmp_path):
    def place(extras=PLAIN, weights="a", model="m", **changes):
        source = MeasuredImages("x", Origin(source="x", weights_hash=weights, model_hash=model), 9, None, {})
        evaluator = Evaluator(extras, None, None, None)
        return evaluator.work_folder(source, protocol(**changes), tmp_path / "evaluations.jsonl")

    assert place().parent == tmp_path / "evaluations.unfinished"
    assert place() == place(asking(metrics=["kid"], bootstrap=100))
    different = [place(), place(weights="b"), place(model="n"), place(num_samples=7), place(asking(metrics=["isc"]))]
    different.append(place(dtype="bfloat16"))
    assert len(set(different)) == 6
    for folder in different[:2]:
        folder.mkdir(parents=True)
    discard_work(different[0])
    assert list(tmp_path.glob("*/*")) == [different[1]]
    discard_work(different[1])
    assert list(tmp_path.iterdir()) == []


def test_a_user_defined_metric_is_one_row(train, run, tmp_path, monkeypatch):
    """Its value is recorded under the features' name, with its settings."""
    monkeypatch.setattr(METRICS, "_rows", dict(METRICS))
    row = Metric(
        ("norm",),
        lambda inputs, settings: {"norm": settings["factor"] * float(inputs.features.norm(dim=1).mean())},
        needs=("features",),
        settings={"factor": 2.0},
        min_images=lambda settings: 301,
    )
    METRICS.register("norm", row)
    with pytest.raises(InputError, match="images for metric norm must be 301 or more, got 300"):
        run(train, extras=asking(metrics=["norm"]))
    METRICS._rows["norm"] = replace(row, min_images=lambda settings: 2)
    found = run(train, extras=asking(metrics=["norm"]))
    features = build_features("digits")(train)
    assert found.metrics == {"norm(digits)": pytest.approx(2 * float(features.norm(dim=1).mean()), rel=1e-5)}
    assert found.metric_settings == {"norm": {"factor": 2.0}} and found.distance == run(train).distance
    command = ["fid", "digits", "--reference", "digits", "--num", "100", "--metrics", "norm"]
    assert main([*command, "--record", str(tmp_path / "r.jsonl")]) == 0
    assert read_records(tmp_path / "r.jsonl")[0].metrics.keys() == {"norm(digits)"}


def test_two_measurements_do_not_share_a_folder(train, run, tmp_path):
    with (
        open_store(tmp_path / "work", {"features": 64}, 300),
        pytest.raises(RunError, match="another process is measuring the same images"),
    ):
        run(train, work=tmp_path / "work")
    run(train, work=tmp_path / "work")


def test_a_second_command_waits_for_the_references_features(extractor, digits, monkeypatch):
    """Two commands on one reference: the second continues when the first releases the cache."""
    first_is_in, second, found = Event(), [], []
    fill = feature_store._fill

    def slow_fill(*args):
        if not second:
            second.append(Thread(target=lambda: found.append(reference_features(digits, extractor, accelerator))))
            second[0].start()
            assert not first_is_in.wait(0.3)  # the second one must still be waiting
        else:
            first_is_in.set()
        fill(*args)

    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(feature_store, "_fill", slow_fill)
    features = reference_features(digits, extractor, accelerator)
    second[0].join(timeout=PATIENCE)
    assert torch.equal(found[0], features)


def test_an_unwritable_cache_is_skipped(extractor, digits, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIA_DIFFUSION_CACHE", str(tmp_path / "file"))
    features = reference_features(digits, extractor, Accelerator(cpu=True))
    torch.testing.assert_close(features, extractor(torch.from_numpy(digits.images)), rtol=1e-5, atol=1e-5)
    with pytest.raises(OSError):  # work that must be resumable isn't skipped
        next(iter_opened(tmp_path / "file" / "work"))


def iter_opened(folder):
    images_of = in_batches(torch.zeros(300, 3, 8, 8, dtype=torch.uint8), 64)
    extractor, progress = build_features("digits"), Progress()
    with filled_store(images_of, 300, extractor, Accelerator(cpu=True), "x", folder=folder, progress=progress) as store:
        yield store


def test_fewer_images_than_asked_for_are_refused(train, run):
    with pytest.raises(InputError, match="images must give 500 images, got 300"):
        run(train, count=500)


def test_warns_of_fewer_images_than_features(protocol):
    (samples,) = few_images_warnings(protocol(num_samples=50, reference_count=596), 64)
    assert "50 samples for 64 features: their covariance is singular" in samples
    (reference,) = few_images_warnings(protocol(num_samples=65, reference_count=64), 64)
    assert "64 reference images for 64 features" in reference
    assert few_images_warnings(protocol(num_samples=65, reference_count=None), 64) == []


def _share(rank, port, folder, images, reference, protocol):
    """Run by each of two connected processes; forked, because importing torch again takes longer than the test."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    extractor, found = build_features("digits"), {}
    for batch in (1, 7, 64):
        asked = []
        images_of = in_batches(images, batch, asked)
        work = folder / "work" if batch == 64 else None
        evaluator = Evaluator(ORDERED, extractor, reference, accelerator)
        record = measure_together([evaluator], source_of(images_of, len(images), protocol), [work])[0]
        found[batch] = [record.distance, len(asked), record.low, record.high]
    (folder / f"found{rank}.json").write_text(json.dumps(found))
    accelerator.end_training()


def test_two_processes_find_the_distance_of_one_and_resume_its_work(extractor, many, digits, tmp_path, protocol, run):
    with pytest.raises(KeyboardInterrupt):
        run(many, work=tmp_path / "work", fail_at=1900)
    reference, port = reference_statistics(digits, extractor), free_port()
    arguments = (port, tmp_path, many, reference, protocol)
    processes = [get_context("fork").Process(target=_share, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=PATIENCE)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in range(2))
    alone = run(many, extras=ORDERED)
    for batch in ("1", "7", "64"):
        assert first[batch][0] == second[batch][0] == pytest.approx(alone.distance, rel=1e-6)  # 1e-3 is promised
        assert first[batch][2:] == pytest.approx([alone.low, alone.high], rel=1e-5)  # depends on the images' order
    assert [first[batch][1] + second[batch][1] for batch in ("1", "7", "64")] == [2402, 2402, 601]
