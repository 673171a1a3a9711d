import pytest
import torch

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.feature_store import chunks_of
from dia_diffusion.evaluation.metrics import Extras, compute_metrics, named


@pytest.mark.parametrize("count", [1, 2, 499, 999, 1000, 1201, 9_999, 10_000, 50_000, 123_457])
def test_chunks_cover_all_images_in_order(count):
    chunks = chunks_of(count)
    assert [index for chunk in chunks for index in chunk] == list(range(count))
    sizes = [len(chunk) for chunk in chunks]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= 2500 * 1.05 + 1 and (len(chunks) == 1 or min(sizes) >= 500)
    assert len(chunks) >= min(20, count // 500)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"metrics": ("fid", "lpips")}, "unknown metric 'lpips'; accepted: fid, kid, isc, prc"),
        ({"bootstrap": 9}, "bootstrap of 9 resamples; accepted: 10 or more"),
        ({"bootstrap": -1}, "bootstrap of -1 resamples"),
        ({"kid_subset_size": 1}, "a KID subset of 1 images"),
    ],
)
def test_what_can_not_be_asked_for(arguments, said):
    with pytest.raises(InputError, match=said):
        Extras(**arguments)


def test_too_few_images_are_refused_before_any_work():
    for metric, least in (("kid", 1000), ("isc", 10), ("prc", 4)):
        Extras((metric,)).check_samples(least)
        with pytest.raises(InputError, match=f"{metric} of {least - 1} images; accepted: {least} or more"):
            Extras((metric,)).check_samples(least - 1)
    with pytest.raises(InputError, match=r"kid of 596 reference images; .* or a smaller --kid-subset-size"):
        Extras(("kid",)).check_reference(596)
    Extras(("isc",)).check_reference(2)
    Extras(("kid",), kid_subset_size=50).check_samples(50)


def test_only_inceptions_scores_have_the_usual_names():
    assert [named("kid", "inception"), named("isc", "inception")] == ["KID", "IS"]
    assert [named("kid", "cifar10"), named("isc", "cifar10")] == ["KD(cifar10)", "IS(cifar10)"]


def test_precision_and_recall_tell_which_side_is_missing():
    """Samples on half of the reference: all are right, half of it is not reached."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(200, 8, generator=generator) + shift for shift in (0, 100))
    samples = torch.randn(200, 8, generator=generator)
    found = compute_metrics(Extras(("prc",)), "a", samples, None, torch.cat([left, right]), torch.device("cpu"))
    assert found["precision(a)"] > 0.8
    assert 0.4 < found["recall(a)"] <= 0.5


def test_inception_score_of_known_classes():
    """Ten certain classes, equally often: the score is their number."""
    logits = 100 * torch.eye(10).repeat(50, 1)
    found = compute_metrics(Extras(("isc",)), "a", torch.zeros(500, 2), logits, None, torch.device("cpu"))
    assert found["IS(a)"] == pytest.approx(10, rel=0.1)  # split at random into ten parts of 50
    same = compute_metrics(Extras(("isc",)), "a", logits, torch.zeros(500, 10), None, torch.device("cpu"))
    assert same["IS(a)"] == pytest.approx(1)
