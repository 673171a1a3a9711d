import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from train_features import accuracy

from dia_diffusion.data import open_images
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import PACKAGED, build_features
from dia_diffusion.evaluation.features.extractor import load_weights
from dia_diffusion.evaluation.features.packaged import Cifar10Classifier, DigitsClassifier
from dia_diffusion.evaluation.frechet import frechet_distance
from dia_diffusion.evaluation.reference import reference_statistics
from dia_diffusion.io import sha256_of_file

WEIGHTS = PACKAGED["digits"].weights


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_weights_are_small_and_recorded(name):
    weights = PACKAGED[name].weights
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


def test_features_do_not_depend_on_an_autocast_or_a_coarser_float32_around_them(extractor, digits):
    """Under these settings, a CPU with bfloat16 support convolves in bfloat16, and a GPU in TF32."""
    images = torch.from_numpy(digits.images[:8])
    exact = extractor(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor(images), exact)
    try:
        for precision in ("bf16", "tf32"):
            torch.backends.fp32_precision = precision
            assert torch.equal(extractor(images), exact)
            assert torch.backends.fp32_precision == precision
    finally:
        torch.backends.fp32_precision = "none"


def test_gray_is_the_mean_of_the_channels(extractor):
    gray = torch.randint(40, 200, (9, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    colored = torch.cat([gray - 40, gray, gray + 40], dim=1)
    torch.testing.assert_close(extractor(colored), extractor(gray))


def test_larger_images_are_reduced_as_pillow_reduces_them(extractor, digits):
    large = digits.images[:4].repeat(4, axis=2).repeat(4, axis=3)
    reduced = np.stack(
        [np.asarray(Image.fromarray(image[0]).resize((8, 8), Image.Resampling.BILINEAR)) for image in large]
    )
    expected = extractor(torch.from_numpy(reduced)[:, None])
    found = extractor(torch.from_numpy(large))
    assert (found - expected).norm() < 0.02 * expected.norm()


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


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match="`features` must be one of digits"):
        build_features("inceptoin")


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)],
)
def test_other_tensors_are_refused(extractor, images):
    with pytest.raises(InputError, match="uint8 images"):
        extractor(images)


def test_other_files_of_weights_are_refused_by_name(tmp_path):
    path = tmp_path / "w.safetensors"
    shutil.copy(WEIGHTS.with_suffix(".json"), path.with_suffix(".json"))
    path.write_bytes(WEIGHTS.read_bytes()[:-1000])
    with pytest.raises(InputError, match=f"{path}.* {sha256_of_file(WEIGHTS)}"):
        build_features("digits", weights=path)
    path.with_suffix(".json").unlink()
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match=f"{path}.* another network's"):
        build_features("digits", weights=path)


def test_color_features_are_the_mean_over_image_and_mirror_of_the_mean_over_the_last_map():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    extractor = build_features("cifar10")
    trunk = load_weights(Cifar10Classifier(), PACKAGED["cifar10"].weights).eval().trunk
    with torch.no_grad():
        maps = [trunk((view / 255 - 0.5) / 0.25) for view in (images, images.flip(3))]
    assert maps[0].shape == (5, 256, 8, 8)
    expected = torch.stack([each.flatten(2).mean(2) for each in maps]).mean(0)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-5)
