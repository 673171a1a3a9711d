import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dia_diffusion.data import open_images
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation import train_features as module
from dia_diffusion.evaluation.features import build_features
from dia_diffusion.evaluation.features.fit_cifar10 import Cifar10Recipe, fit_cifar10
from dia_diffusion.evaluation.features.fit_digits import DigitsRecipe, fit_digits
from dia_diffusion.evaluation.train_features import accuracy, train_features


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
    card = train_features("digits", tmp_path / "w.safetensors", seed=5, progress=lambda *done: told.append(done))
    assert json.loads((tmp_path / "w.json").read_text()) == card
    assert card["seed"] == 5
    assert card["recipe"]["steps"] == 3
    assert told == [(1, 3), (2, 3), (3, 3)]
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


def test_colour_features_are_trained_on_images_of_a_folder(monkeypatch, tmp_path, stripes):
    recipe = Cifar10Recipe(steps=60, warmup_steps=10, batch_size=32, learning_rate=0.05)
    monkeypatch.setitem(module.TRAININGS, "cifar10", replace(module.TRAININGS["cifar10"], recipe=recipe))
    card = train_features("cifar10", tmp_path / "w.safetensors", data=stripes)
    assert card["test_accuracy"] > 0.6
    assert (card["train_images"], card["test_images"], card["source"]) == (300, 60, "stripes")
    extractor = build_features("cifar10", weights=tmp_path / "w.safetensors")
    assert extractor.num_features == 256
    assert (tmp_path / "w.safetensors").stat().st_size < 2_000_000
    # What the file holds in half precision is what was tested.
    images = open_images(stripes, split="test")
    _, logits = extractor.with_logits(torch.from_numpy(images.images))
    assert (logits.argmax(1).numpy() == images.labels).mean() == pytest.approx(card["test_accuracy"])


def test_the_seed_alone_decides_for_colour_features_too():
    images = np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), dtype=np.uint8)
    recipe = Cifar10Recipe(steps=2, warmup_steps=1, batch_size=16)
    first, again, other = (
        fit_cifar10(images, np.arange(64) % 10, recipe, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_images_of_other_classes_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "two" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "two" / name / "0.png")
    with pytest.raises(InputError, match="two has 2 classes; accepted: images of 10 classes"):
        train_features("cifar10", tmp_path / "w.safetensors", data=tmp_path / "two", test_data=tmp_path / "two")


def test_unknown_features_and_other_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no training for features 'digit'; there are: digits, cifar10"):
        train_features("digit", tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"must end in \.safetensors"):
        train_features("digits", tmp_path / "w.pt")
