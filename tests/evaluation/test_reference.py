import numpy as np
import pytest
import torch

from dia_diffusion.data import open_images
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation import reference as module
from dia_diffusion.evaluation.features import PACKAGED, build_features
from dia_diffusion.evaluation.reference import choose, floor_distance, reference_statistics


def cached(own_cache):
    return sorted((own_cache / "statistics").iterdir())


@pytest.mark.parametrize(
    ("asked", "indices"), [({}, range(596)), ({"count": 50}, range(50)), ({"count": 50, "seed": 3}, choose(596, 50, 3))]
)
def test_statistics_are_those_of_the_images_chosen(extractor, digits, asked, indices):
    reference = reference_statistics(digits, extractor, **asked)
    features = extractor(torch.from_numpy(digits.images[list(indices)])).double().numpy()
    assert reference.statistics.count == len(features)
    np.testing.assert_allclose(reference.statistics.mean, features.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(reference.statistics.covariance, np.cov(features, rowvar=False), rtol=1e-5, atol=1e-5)
    assert (reference.name, reference.split, reference.shape) == ("digits", "test", (3, 8, 8))


def test_choice_is_a_function_of_the_seed_without_repetition():
    first, again, other = (set(choose(100, 30, seed)) for seed in (1, 1, 2))
    assert first == again != other and len(first) == 30


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "must be 1 to 596, the size of the source, got 0"),
        (597, "must be 1 to 596, the size of the source, got 597"),
        (1, "digits must have 2 images or more, got 1"),
    ],
)
def test_impossible_counts_are_refused_before_anything_is_measured(extractor, digits, own_cache, count, said):
    with pytest.raises(InputError, match=said):
        reference_statistics(digits, extractor, count=count)
    assert not own_cache.exists()


def test_second_time_nothing_is_measured(extractor, digits, monkeypatch):
    first = reference_statistics(digits, extractor, count=64)
    monkeypatch.setattr(module, "_measure_layers", None)
    again = reference_statistics(digits, extractor, count=64)
    assert again.hash == first.hash
    assert torch.equal(again.statistics.outer, first.statistics.outer)


def test_each_input_of_the_statistics_changes_the_cache_file(extractor, digits, own_cache, tmp_path):
    path = tmp_path / "other.safetensors"
    data = bytearray(PACKAGED["digits"].weights.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)
    other_weights = build_features("digits", weights=path)
    reference_statistics(digits, extractor)
    reference_statistics(digits, extractor, count=100)
    reference_statistics(digits, extractor, count=100, seed=0)
    reference_statistics(digits, other_weights, count=100)
    reference_statistics(open_images("digits", split="train"), extractor, count=100)
    assert len(cached(own_cache)) == 5
    reference_statistics(digits, extractor, count=596)  # 596 is the whole set, so the same file
    assert len(cached(own_cache)) == 5


def test_cache_file_cut_short_is_computed_again(extractor, digits, own_cache):
    first = reference_statistics(digits, extractor)
    (path,) = cached(own_cache)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    again = reference_statistics(digits, extractor)
    assert torch.equal(again.statistics.outer, first.statistics.outer)
    assert len(path.read_bytes()) == len(whole)


def test_floor_is_the_distance_of_other_real_images(extractor, digits):
    train = open_images("digits", split="train")
    reference = reference_statistics(digits, extractor)
    floor = floor_distance(reference, train, extractor, count=len(digits))
    assert 0 < floor < floor_distance(reference, train, extractor, count=100)
