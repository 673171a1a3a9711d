import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.optimize import linear_sum_assignment

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.feature_store import chunks_of
from dia_diffusion.evaluation.metrics import METRICS, MetricInputs, labelled
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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bootstrap": 9}, "10 or more, or 0 for none"),
        ({"bootstrap": -1}, "greater than or equal to 0"),
        ({"kid_subset_size": 1}, "greater than or equal to 2"),
    ],
)
def test_what_can_not_be_asked_for(options, said):
    with pytest.raises(ValidationError, match=said):
        asking(**options)
    with pytest.raises(ValidationError, match=r"must be one of fid, sfid, .*, got 'lpips'"):
        asking("fid", "lpips")


def test_too_few_images_are_refused_before_any_work():
    for metric, least in (("kid", 1000), ("isc", 10), ("prc", 4), ("dc", 6)):
        asking(metric).check_count(least)
        with pytest.raises(InputError, match=f"images for metric {metric} must be {least} or more, got {least - 1}"):
            asking(metric).check_count(least - 1)
    with pytest.raises(InputError, match=r"reference images for metric kid must be 1000 or more.*`kid_subset_size`"):
        asking("kid").check_count(596, reference=True)
    asking("isc").check_count(2, reference=True)
    asking("kid", kid_subset_size=50).check_count(50)


def test_only_inceptions_scores_have_the_usual_names():
    assert asking("kid", "isc").metric_labels("inception") == ["KID", "IS"]
    assert asking("kid", "isc").metric_labels("cifar10") == ["KD(cifar10)", "IS(cifar10)"]


def computed(name, **inputs):
    values = MetricInputs(None, None, torch.device("cpu"), **inputs)
    return labelled(METRICS[name], METRICS[name].compute(values, asking().settings_of(name)), "a")


def test_precision_and_recall_tell_which_side_is_missing():
    """Samples on half of the reference: all are right, half of it is not reached."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(200, 8, generator=generator) + shift for shift in (0, 100))
    samples = torch.randn(200, 8, generator=generator)
    found = computed("prc", features=samples, reference_features=torch.cat([left, right]))
    assert found["precision(a)"] > 0.8
    assert 0.4 < found["recall(a)"] <= 0.5


def test_inception_score_of_known_classes():
    """Ten certain classes, equally often: the score is their number."""
    found = computed("isc", logits=100 * torch.eye(10).repeat(50, 1))
    assert found["IS(a)"] == pytest.approx(10, rel=0.1)  # split at random into ten parts of 50
    assert computed("isc", logits=torch.zeros(500, 10))["IS(a)"] == pytest.approx(1)


def gaussians(*sizes, width=8, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first, *others = (torch.randn(size, width, generator=generator) for size in sizes)
    return first + shift, *others


def test_density_and_coverage_are_their_definition(monkeypatch):
    """Equations 3 and 4 of Naeem et al. by all pairs in float64, in blocks that don't divide the images."""
    monkeypatch.setattr("dia_diffusion.evaluation.metrics.ROWS", 64)
    features, reference = gaussians(150, 300, shift=0.4)
    found = computed("dc", features=features, reference_features=reference)
    fake, real = features.double().numpy(), reference.double().numpy()
    radii = np.sort(np.linalg.norm(real[:, None] - real, axis=2), axis=1)[:, 5]
    within = np.linalg.norm(real[:, None] - fake, axis=2) < radii[:, None]
    assert found["density(a)"] == pytest.approx(within.sum() / (5 * 150), rel=1e-9)
    assert found["coverage(a)"] == pytest.approx(within.any(1).mean(), rel=1e-9)
    assert 0.2 < found["density(a)"] < 0.9 and 0.2 < found["coverage(a)"] < 0.9


def test_density_and_coverage_of_real_images_are_known():
    """For images like the real ones, and as many, density is 1 and coverage 1 - 1/2^k on average (Naeem et al.)."""
    features, reference = gaussians(2000, 2000)
    found = computed("dc", features=features, reference_features=reference)
    assert found["density(a)"] == pytest.approx(1, abs=0.03)
    assert found["coverage(a)"] == pytest.approx(1 - 1 / 2**5, abs=0.01)


def test_mind_of_shifted_images_is_three_times_the_squared_shift(monkeypatch):
    """A shift by d moves each sorted projection by d.w, and (d.w)^2 is |d|^2 / D on average over directions w."""
    (features,) = gaussians(500, width=16)
    shift = torch.linspace(-1, 2, 16)
    found = computed("mind", features=features + shift, reference_features=features)
    assert found["MIND(a)"] == pytest.approx(3 * float(shift.square().sum()), rel=0.15)  # 1,000 directions: 4 %
    generator = torch.Generator().manual_seed(2020)
    directions = torch.nn.functional.normalize(torch.randn(1000, 16, generator=generator))
    exact = 48 * float((directions.double() @ shift.double()).square().mean())
    assert found["MIND(a)"] == pytest.approx(exact, rel=1e-5)
    monkeypatch.setattr("dia_diffusion.evaluation.metrics.DIRECTIONS", 7)
    assert computed("mind", features=features + shift, reference_features=features) == pytest.approx(found, rel=1e-6)


def test_mind_pairs_sorted_projections():
    """The 2-Wasserstein distance of equally many numbers, found by trying all pairings."""
    features, reference = gaussians(20, 20, width=3, shift=0.5)
    found = computed("mind", features=features, reference_features=reference)["MIND(a)"]
    directions = torch.nn.functional.normalize(torch.randn(1000, 3, generator=torch.Generator().manual_seed(2020)))
    costs = ((features @ directions.T)[:, None] - (reference @ directions.T)[None]).square().double().numpy()
    best = [cost[linear_sum_assignment(cost)].mean() for cost in np.moveaxis(costs, 2, 0)]
    assert found == pytest.approx(9 * np.mean(best), rel=1e-5)


def test_mind_of_unequal_counts_uses_as_many_of_the_larger_set():
    features, reference = gaussians(300, 500, shift=0.5)
    found = computed("mind", features=features, reference_features=reference)
    chosen = torch.randperm(500, generator=torch.Generator().manual_seed(2020))[:300]
    equal = computed("mind", features=features, reference_features=reference[chosen])
    assert found["MIND(a)"] == pytest.approx(equal["MIND(a)"], rel=0.1)  # by other directions
    assert found == computed("mind", features=features, reference_features=reference)


def test_extrapolation_needs_more_images_than_features_in_each_part():
    asking("fd-inf").check_count(257, num_features=64)
    with pytest.raises(InputError, match="images for metric fd-inf in 64 features must be 257 or more, got 256"):
        asking("fd-inf").check_count(256, num_features=64)
