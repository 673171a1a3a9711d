import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.feature_store import chunks_of
from dia_diffusion.evaluation.metrics import METRICS, MetricInputs, labeled
from dia_diffusion.evaluation.protocol import EvalProtocol


def asking(*metrics, **options):
    return EvalProtocol(features="digits", num_samples=2, sampler="ddim", steps=1, metrics=list(metrics), **options)


@pytest.mark.parametrize("count", [1, 2, 499, 999, 1000, 1201, 9_999, 10_000, 50_000, 123_457])
def test_chunks_cover_all_images_in_order(count):
    chunks = chunks_of(count)
    assert [index for chunk in chunks for index in chunk] == list(range(count))
    sizes = [len(chunk) for chunk in chunks]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= 2500 * 1.05 + 1 and (len(chunks) == 1 or min(sizes) >= 500)
    assert len(chunks) >= min(20, count // 500)


def test_too_few_images_are_refused_before_any_work():
    for metric, least in (("kid", 1000), ("isc", 10), ("prc", 4), ("dc", 6)):
        asking(metric).check_count(least)
        with pytest.raises(InputError, match=f"images for metric {metric} must be {least} or more.*, got {least - 1}$"):
            asking(metric).check_count(least - 1)
    said = "reference images for metric kid must be 1000 or more, as many as `kid_subset_size`, got 596"
    with pytest.raises(InputError, match=said):
        asking("kid").check_count(596, reference=True)
    asking("isc").check_count(2, reference=True)
    asking("kid", kid_subset_size=50).check_count(50)


def test_only_inceptions_scores_have_the_usual_names():
    assert asking("kid", "isc").metric_labels("inception") == ["KID", "IS"]
    assert asking("kid", "isc").metric_labels("cifar10") == ["KD(cifar10)", "IS(cifar10)"]


def computed(name, **inputs):
    values = MetricInputs(None, None, torch.device("cpu"), **inputs)
    return labeled(METRICS[name], METRICS[name].compute(values, asking().settings_of(name)), "a")


def gaussians(*sizes, width=8, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first, *others = (torch.randn(size, width, generator=generator) for size in sizes)
    return first + shift, *others


def test_density_and_coverage_match_their_definition(monkeypatch):
    """Equations 3 and 4 of Naeem et al. over all pairs in float64; the blocks don't divide the number of images."""
    monkeypatch.setattr("dia_diffusion.evaluation.metrics.ROWS", 64)
    features, reference = gaussians(150, 300, shift=0.4)
    found = computed("dc", features=features, reference_features=reference)
    fake, real = features.double().numpy(), reference.double().numpy()
    radii = np.sort(np.linalg.norm(real[:, None] - real, axis=2), axis=1)[:, 5]
    within = np.linalg.norm(real[:, None] - fake, axis=2) < radii[:, None]
    assert found["density(a)"] == pytest.approx(within.sum() / (5 * 150), rel=1e-9)
    assert found["coverage(a)"] == pytest.approx(within.any(1).mean(), rel=1e-9)
    assert 0.2 < found["density(a)"] < 0.9 and 0.2 < found["coverage(a)"] < 0.9


def test_mind_pairs_sorted_projections(monkeypatch):
    """The 2-Wasserstein distance of two equally large sets of numbers, from the best assignment."""
    features, reference = gaussians(20, 20, width=3, shift=0.5)
    found = computed("mind", features=features, reference_features=reference)["MIND(a)"]
    directions = torch.nn.functional.normalize(torch.randn(1000, 3, generator=torch.Generator().manual_seed(2020)))
    costs = ((features @ directions.T)[:, None] - (reference @ directions.T)[None]).square().double().numpy()
    best = [cost[linear_sum_assignment(cost)].mean() for cost in np.moveaxis(costs, 2, 0)]
    assert found == pytest.approx(9 * np.mean(best), rel=1e-5)
    monkeypatch.setattr("dia_diffusion.evaluation.metrics.DIRECTIONS", 7)
    in_parts = computed("mind", features=features, reference_features=reference)["MIND(a)"]
    assert in_parts == pytest.approx(found, rel=1e-6)


def test_mind_of_unequal_counts_uses_as_many_of_the_larger_set():
    features, reference = gaussians(300, 500, shift=0.5)
    found = computed("mind", features=features, reference_features=reference)
    chosen = torch.randperm(500, generator=torch.Generator().manual_seed(2020))[:300]
    equal = computed("mind", features=features, reference_features=reference[chosen])
    assert found["MIND(a)"] == pytest.approx(equal["MIND(a)"], rel=0.1)  # with other directions
    assert found == computed("mind", features=features, reference_features=reference)


def test_extrapolation_needs_more_images_than_features_in_each_part():
    asking("fd-inf").check_count(257, num_features=64)
    with pytest.raises(InputError, match="images for metric fd-inf in 64 features must be 257 or more, got 256"):
        asking("fd-inf").check_count(256, num_features=64)
