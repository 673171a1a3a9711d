import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from dia_diffusion.data import open_images
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.evaluate import evaluate, measure
from dia_diffusion.evaluation.record import Origin
from dia_diffusion.evaluation.reference import reference_statistics

ORIGIN = Origin(source="runs/a", unit="none", step=7, images_seen=224)


@pytest.fixture(scope="module")
def train():
    return torch.from_numpy(open_images("digits", split="train").images[:300])


def test_images_are_forgotten_once_measured(extractor, train):
    seen = []

    def stream():
        for batch in train.split(32):
            batch = batch.clone()
            assert all(earlier() is None for earlier in seen[:-1])
            seen.append(weakref.ref(batch))
            yield batch

    assert measure(stream(), extractor).count == 300


def test_distance_is_torch_fidelitys_and_the_record_carries_the_rest(extractor, train, digits, protocol):
    reference = reference_statistics(digits, extractor).statistics
    found = evaluate(train.split(50), extractor, reference, protocol(num_samples=300), ORIGIN)
    features = [extractor(images).double() for images in (train, torch.from_numpy(digits.images))]
    statistics = [fid_features_to_statistics(each) for each in features]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert found.distance == pytest.approx(expected, rel=1e-6)
    assert (found.metric, found.source, found.unit, found.step) == ("FD(digits)", "runs/a", "none", 7)
    assert found.protocol == protocol(num_samples=300)
    assert found.seconds > 0


def test_batch_size_hardly_changes_a_distance(extractor, train, digits, protocol):
    reference = reference_statistics(digits, extractor).statistics
    distances = [
        evaluate(train.split(size), extractor, reference, protocol(num_samples=300), ORIGIN).distance
        for size in (1, 37, 300)
    ]
    assert distances == pytest.approx([distances[0]] * 3, rel=1e-5)


def test_fewer_images_than_asked_for_are_refused(extractor, train, digits, protocol):
    reference = reference_statistics(digits, extractor).statistics
    with pytest.raises(InputError, match="500 images asked for, runs/a gave 300"):
        evaluate(train.split(50), extractor, reference, protocol(num_samples=500), ORIGIN)


def test_warns_of_fewer_images_than_features(extractor, train, digits, protocol):
    reference = reference_statistics(digits, extractor).statistics
    with pytest.warns(UserWarning, match="50 samples for 64 features: their covariance is singular"):
        evaluate([train[:50]], extractor, reference, protocol(num_samples=50), ORIGIN)
    with pytest.warns(UserWarning, match="64 reference images for 64 features"):
        evaluate([train], extractor, reference, protocol(num_samples=300, reference_count=64), ORIGIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate([train[:65]], extractor, reference, protocol(num_samples=65), ORIGIN)


SHARE = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from dia_diffusion.data import open_images
from dia_diffusion.evaluation.evaluate import evaluate
from dia_diffusion.evaluation.features import build_features
from dia_diffusion.evaluation.record import Origin, Protocol
from dia_diffusion.evaluation.statistics import FeatureStatistics

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
share = torch.from_numpy(open_images("digits", split="train").images[:300][rank::2])
reference, provenance = FeatureStatistics.load(folder / "reference.safetensors")
protocol = Protocol(**provenance["protocol"])
print(evaluate(share.split(50), build_features("digits"), reference, protocol, Origin(source="a")).distance)
"""


def test_two_processes_find_the_distance_of_one(extractor, train, digits, tmp_path, protocol):
    reference = reference_statistics(digits, extractor).statistics
    reference.save(tmp_path / "reference.safetensors", {"protocol": vars(protocol(num_samples=300))})
    processes = [
        subprocess.Popen([sys.executable, "-c", SHARE, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    found = [float(process.communicate(timeout=240)[0]) for process in processes]
    alone = evaluate([train], extractor, reference, protocol(num_samples=300), ORIGIN).distance
    assert found[0] == found[1]
    assert found[0] == pytest.approx(alone, rel=1e-6)
