import pytest
import torch
from pydantic import ValidationError

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
    with pytest.raises(ValidationError, match="must be one of fid, kid, isc, prc, got 'lpips'"):
        asking("fid", "lpips")


def test_too_few_images_are_refused_before_any_work():
    for metric, least in (("kid", 1000), ("isc", 10), ("prc", 4)):
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
