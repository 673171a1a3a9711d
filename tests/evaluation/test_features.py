import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from safetensors.torch import save_file
from train_features import accuracy

from dia_diffusion.data import open_images
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import FEATURES, build_features
from dia_diffusion.evaluation.features.extractor import fold_normalisations, load_weights
from dia_diffusion.evaluation.features.packaged import Cifar10Classifier, DigitsClassifier
from dia_diffusion.evaluation.frechet import frechet_distance
from dia_diffusion.evaluation.reference import reference_statistics
from dia_diffusion.io import sha256_of_file
from tests.evaluation.torch_images import Images

WEIGHTS = FEATURES["digits"].weights


@pytest.mark.parametrize("name", FEATURES)
def test_packaged_weights_are_small_and_recorded(name):
    weights = FEATURES[name].weights
    card = json.loads(weights.with_suffix(".json").read_text())
    assert weights.stat().st_size < 2_000_000
    assert card["sha256"] == sha256_of_file(weights)
    assert card["test_accuracy"] >= 0.9
    assert {"seed", "recipe", "data", "train_fingerprint", "licence"} <= card.keys()


def test_packaged_classifier_knows_the_held_out_digits():
    card = json.loads(WEIGHTS.with_suffix(".json").read_text())
    test = open_images("digits", split="test", channels=1)
    found = accuracy(load_weights(DigitsClassifier(), WEIGHTS), test)
    assert found >= 0.97
    assert found == pytest.approx(card["test_accuracy"], abs=2 / len(test))
    assert card["test_fingerprint"] == test.fingerprint


def test_features_do_not_depend_on_the_batch(extractor, digits):
    images = torch.from_numpy(digits.images[:96])
    together = extractor(images)
    assert together.shape == (96, extractor.num_features)
    assert together.dtype == torch.float32
    for size in (1, 5, 32):
        apart = torch.cat([extractor(batch) for batch in images.split(size)])
        torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(extractor(images.flip(0)).flip(0), together, rtol=1e-5, atol=1e-5)


def test_features_do_not_depend_on_an_autocast_around_them(extractor, digits):
    images = torch.from_numpy(digits.images[:8])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = extractor(images)
    assert torch.equal(features, extractor(images))


def test_features_do_not_depend_on_a_coarser_float32_around_them(extractor, digits):
    """A CPU with bfloat16 products computes convolutions in it then; a GPU does in TF32."""
    images = torch.from_numpy(digits.images[:8])
    exact = extractor(images)
    try:
        for precision in ("bf16", "tf32"):
            torch.backends.fp32_precision = precision
            assert torch.equal(extractor(images), exact)
            assert torch.backends.fp32_precision == precision
    finally:
        torch.backends.fp32_precision = "none"


def test_grey_is_the_mean_of_the_channels(extractor):
    grey = torch.randint(40, 200, (9, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    coloured = torch.cat([grey - 40, grey, grey + 40], dim=1)
    torch.testing.assert_close(extractor(coloured), extractor(grey))


def test_larger_images_are_reduced_as_pillow_reduces_them(extractor, digits):
    large = digits.images[:4].repeat(4, axis=2).repeat(4, axis=3)
    reduced = np.stack(
        [np.asarray(Image.fromarray(image[0]).resize((8, 8), Image.Resampling.BILINEAR)) for image in large]
    )
    expected = extractor(torch.from_numpy(reduced)[:, None])
    found = extractor(torch.from_numpy(large))
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_torch_fidelity_finds_it_by_name_and_agrees_on_the_distance(extractor, digits):
    first, second = digits.subset(range(300)), digits.subset(range(300, 596))
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(first.images),
        input2=Images(second.images),
        feature_extractor="digits",
        fid=True,
        isc=True,
        cuda=False,
        cache=False,
        save_cpu_ram=True,  # no worker processes
        verbose=False,
        batch_size=50,
    )
    ours = frechet_distance(
        reference_statistics(first, extractor).statistics, reference_statistics(second, extractor).statistics
    )
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert 5 < theirs["inception_score_mean"] < 10


def test_distance_grows_with_damage(extractor, digits):
    train = open_images("digits", split="train")
    reference = reference_statistics(digits, extractor)
    generator = np.random.default_rng(0)
    noise = generator.normal(size=train.images.shape)

    def distance(images):
        features = extractor(torch.from_numpy(images)).double().numpy()
        mean, covariance = features.mean(0), np.cov(features, rowvar=False)
        return frechet_distance(SimpleNamespace(mean=mean, covariance=covariance), reference.statistics)

    noisy = [distance((train.images + s * noise).clip(0, 255).astype(np.uint8)) for s in (0, 16, 32, 64, 128)]
    assert noisy == sorted(noisy)
    missing = [distance(train.images[train.labels < k]) for k in (10, 9, 8, 6, 4)]
    assert missing == sorted(missing)
    assert missing[1] > 2 * missing[0]


def test_folded_normalisations_change_nothing():
    torch.manual_seed(0)
    network = Cifar10Classifier()
    network(torch.rand(64, 3, 32, 32))  # moves the running moments away from 0 and 1
    network.eval()
    images = torch.rand(9, 3, 32, 32)
    expected = network(images)
    fold_normalisations(network)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)


def test_unknown_name_is_told_which_exist():
    with pytest.raises(InputError, match="`features` must be one of digits"):
        build_features("inceptoin")


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)],
)
def test_other_tensors_are_refused(extractor, images):
    with pytest.raises(InputError, match="uint8 images"):
        extractor(images)


def _one_line(caught, path):
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("with_card", [True, False])
def test_weights_cut_short_are_refused(tmp_path, with_card):
    path = tmp_path / "digits.safetensors"
    path.write_bytes(WEIGHTS.read_bytes()[:-1000])
    if with_card:
        shutil.copy(WEIGHTS.with_suffix(".json"), tmp_path)
    expected = sha256_of_file(WEIGHTS) if with_card else "truncated"
    with pytest.raises(InputError, match=expected) as caught:
        build_features("digits", weights=path)
    _one_line(caught, path)


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="another network's") as caught:
        build_features("digits", weights=path)
    _one_line(caught, path)


def test_a_card_that_says_nothing_is_refused(tmp_path):
    shutil.copy(WEIGHTS, tmp_path / "w.safetensors")
    (tmp_path / "w.json").write_text("{}")
    with pytest.raises(InputError, match="says no sha256") as caught:
        build_features("digits", weights=tmp_path / "w.safetensors")
    _one_line(caught, tmp_path / "w.json")


def test_missing_weights_are_refused(tmp_path):
    with pytest.raises(InputError, match="missing") as caught:
        build_features("digits", weights=tmp_path / "none.safetensors")
    _one_line(caught, tmp_path)


def test_color_features_are_the_mean_over_image_and_mirror_of_the_mean_over_the_last_map():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    extractor = build_features("cifar10")
    trunk = load_weights(Cifar10Classifier(), FEATURES["cifar10"].weights).eval().trunk
    with torch.no_grad():
        maps = [trunk((view / 255 - 0.5) / 0.25) for view in (images, images.flip(3))]
    assert maps[0].shape == (5, 256, 8, 8)
    expected = torch.stack([each.flatten(2).mean(2) for each in maps]).mean(0)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-5)
