import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dia_diffusion.data import open_images
from dia_diffusion.errors import InputError, Stopped
from dia_diffusion.evaluation import train_features as module
from dia_diffusion.evaluation.features import FEATURES, build_features
from dia_diffusion.evaluation.features.extractor import load_weights
from dia_diffusion.evaluation.features.fit_digits import DigitsRecipe, fit_digits
from dia_diffusion.evaluation.features.packaged import Cifar10Classifier
from dia_diffusion.evaluation.train_features import accuracy, train_features
from dia_diffusion.models.classifiers import load_classifier
from tests.training.conftest import Recorder


@pytest.fixture(scope="module")
def train():
    return open_images("digits", split="train", channels=1)


def test_a_short_training_already_reads_most_held_out_digits(train):
    test = open_images("digits", split="test", channels=1)
    classifier = fit_digits(train.images, train.labels, DigitsRecipe(steps=150), seed=0)
    assert accuracy(classifier, test) > 0.9


def test_the_seed_alone_decides(train):
    recipe = DigitsRecipe(steps=5)
    torch.manual_seed(7)
    first = fit_digits(train.images, train.labels, recipe, seed=1).state_dict()
    torch.manual_seed(8)
    again = fit_digits(train.images, train.labels, recipe, seed=1).state_dict()
    other = fit_digits(train.images, train.labels, recipe, seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_weights_and_card_are_written_and_load(monkeypatch, tmp_path):
    short = replace(module.TRAININGS["digits"], recipe=DigitsRecipe(steps=3))
    monkeypatch.setitem(module.TRAININGS, "digits", short)
    told = []
    card = train_features("digits", tmp_path / "w.safetensors", seed=5, reporter=Recorder(told.append))
    assert json.loads((tmp_path / "w.json").read_text()) == card
    assert card["seed"] == 5
    assert card["recipe"]["steps"] == 3
    assert told == [1, 2, 3]
    assert build_features("digits", weights=tmp_path / "w.safetensors").weights_hash == card["sha256"]


@pytest.fixture
def stripes(tmp_path):
    """A folder of 32x32 colour images in ten classes that a few steps can tell apart: stripes of ten periods."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 6)):
        for period in range(2, 12):
            folder = tmp_path / "stripes" / split / f"{period:02}"
            folder.mkdir(parents=True)
            for index in range(count):
                phase, colour = generator.integers(period), generator.integers(128, 256, 3)
                lit = (np.arange(32) + phase) % period < period / 2
                image = np.broadcast_to(lit[:, None, None] * colour, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(image).save(folder / f"{index}.png")
    return tmp_path / "stripes"


SHORT = """
data: {augmentation: pad-crop, border: reflected, cutout: 8, mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
model: {backbone: feature-resnet}
train: {batch_size: 32, max_steps: STEPS, mixed_precision: none, label_smoothing: 0.1, checkpoint_every: 20}
optimizer: {learning_rate: 0.05, nesterov: true, weight_decay: 5.0e-4, warmup_steps: 10, schedule: linear}
"""


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Gives the recipe of colour features so few steps."""

    def shorten(steps):
        (tmp_path / "short.yaml").write_text(SHORT.replace("STEPS", str(steps)))
        training = replace(module.TRAININGS["cifar10"], recipe=str(tmp_path / "short.yaml"))
        monkeypatch.setitem(module.TRAININGS, "cifar10", training)

    return shorten


def test_colour_features_are_trained_on_images_of_a_folder(short, tmp_path, stripes):
    short(60)
    card = train_features("cifar10", tmp_path / "w.safetensors", data=stripes, reporter=Recorder())
    assert json.loads((tmp_path / "w.json").read_text()) == card
    assert card["test_accuracy"] > 0.6
    assert (card["train_images"], card["test_images"], card["source"]) == (300, 60, "stripes")
    assert card["recipe"]["model"]["backbone"] == "feature-resnet"
    extractor = build_features("cifar10", weights=tmp_path / "w.safetensors")
    assert extractor.num_features == 256
    assert (tmp_path / "w.safetensors").stat().st_size < 2_000_000
    # What the file holds in half precision is what was tested.
    images = open_images(stripes, split="test")
    _, logits = extractor.with_logits(torch.from_numpy(images.images))
    assert (logits.argmax(1).numpy() == images.labels).mean() == pytest.approx(card["test_accuracy"])
    # It is what `dia-diffusion classify` trained and tested, there in float32.
    saved = load_classifier(tmp_path / "w.run")
    expected = saved.model(saved.prepare(torch.from_numpy(images.images)))
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.02)
    assert json.loads((tmp_path / "w.run" / "result.json").read_text())["test_accuracy"] == pytest.approx(
        card["test_accuracy"], abs=2.5 / 60
    )


def test_a_training_of_colour_features_that_was_stopped_goes_on(short, tmp_path, stripes):
    def stop(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    short(5)
    whole = train_features("cifar10", tmp_path / "whole.safetensors", data=stripes, seed=1, reporter=Recorder())
    with pytest.raises(Stopped, match="stopped after step 3"):
        train_features("cifar10", tmp_path / "cut.safetensors", data=stripes, seed=1, reporter=Recorder(stop))
    assert not (tmp_path / "cut.safetensors").exists()
    with pytest.raises(InputError, match="seed: 1 -> 2"):
        train_features("cifar10", tmp_path / "cut.safetensors", data=stripes, seed=2, reporter=Recorder())
    cut = train_features("cifar10", tmp_path / "cut.safetensors", data=stripes, seed=1, reporter=Recorder())
    assert cut["sha256"] == whole["sha256"], "the same bits"


def test_colour_features_are_the_mean_over_image_and_mirror_of_the_mean_over_the_last_map():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    extractor = build_features("cifar10")
    trunk = load_weights(Cifar10Classifier(), FEATURES["cifar10"].weights).eval().trunk
    with torch.no_grad():
        maps = [trunk((view / 255 - 0.5) / 0.25) for view in (images, images.flip(3))]
    assert maps[0].shape == (5, 256, 8, 8)
    expected = torch.stack([each.flatten(2).mean(2) for each in maps]).mean(0)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-5)


def test_images_of_other_classes_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "two" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "two" / name / "0.png")
    two = tmp_path / "two"
    for name, message in (
        ("cifar10", "`model.num_classes` must be 2, .*two, got 10"),
        ("digits", "two has 2 classes; accepted: images of 10"),
    ):
        with pytest.raises(InputError, match=message):
            train_features(name, tmp_path / "w.safetensors", data=two, test_data=two, reporter=Recorder())
    assert not (tmp_path / "w.run").exists()


def test_unknown_features_and_other_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no training for features 'digit'; there are: digits, cifar10"):
        train_features("digit", tmp_path / "w.safetensors", reporter=Recorder())
    with pytest.raises(InputError, match=r"must end in \.safetensors"):
        train_features("digits", tmp_path / "w.pt", reporter=Recorder())
