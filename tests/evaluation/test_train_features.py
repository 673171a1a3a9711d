import json

import pytest
import torch

from dia_diffusion.data import open_images
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation import train_features as module
from dia_diffusion.evaluation.features import build_features
from dia_diffusion.evaluation.train_features import DigitsRecipe, accuracy, fit_digits, train_features


@pytest.fixture(scope="module")
def train():
    return open_images("digits", split="train", channels=1)


def test_a_short_training_already_reads_most_held_out_digits(train):
    test = open_images("digits", split="test", channels=1)
    classifier = fit_digits(train.images, train.labels, DigitsRecipe(steps=150), seed=0)
    assert accuracy(classifier, test.images, test.labels) > 0.9


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
    monkeypatch.setattr(module, "DigitsRecipe", lambda: DigitsRecipe(steps=3))
    told = []
    card = train_features("digits", tmp_path / "w.safetensors", seed=5, progress=lambda *done: told.append(done))
    assert json.loads((tmp_path / "w.json").read_text()) == card
    assert card["seed"] == 5
    assert card["recipe"]["steps"] == 3
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert build_features("digits", weights=tmp_path / "w.safetensors").weights_hash == card["sha256"]


def test_unknown_features_and_other_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no training for features 'digit'; there is: digits"):
        train_features("digit", tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"must end in \.safetensors"):
        train_features("digits", tmp_path / "w.pt")
