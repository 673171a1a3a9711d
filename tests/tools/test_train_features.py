import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import train_features as module
from PIL import Image
from train_features import DigitsRecipe, Options, accuracy, fit_digits, train_features

from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.errors import InputError, Stopped
from dia_diffusion.evaluation.features import build_features
from dia_diffusion.models.classifiers import load_classifier
from tests.tools.conftest import script_error
from tests.training.conftest import Recorder


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return open_images("digits", split="train", channels=1)


def test_a_short_training_reads_most_held_out_digits(digits: ImageSet) -> None:
    test = open_images("digits", split="test", channels=1)
    classifier = fit_digits(digits.images, digits.labels, DigitsRecipe(steps=80), seed=0)
    assert accuracy(classifier, test) > 0.8


def test_the_seed_alone_decides(digits: ImageSet) -> None:
    weights = []
    for seed, surroundings in ((1, 7), (1, 8), (2, 8)):
        torch.manual_seed(surroundings)
        weights.append(fit_digits(digits.images, digits.labels, DigitsRecipe(steps=5), seed=seed).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["head.weight"], weights[2]["head.weight"])


def test_weights_and_card_are_written_and_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "DIGITS_RECIPE", replace(module.DIGITS_RECIPE, steps=3))
    steps: list[int] = []
    card = train_features(Options(name="digits", out=tmp_path / "w.safetensors", seed=5), Recorder(steps.append))
    assert card is not None and json.loads((tmp_path / "w.json").read_text()) == card
    assert card["seed"] == 5 and card["recipe"]["steps"] == 3 and steps == [1, 2, 3]
    assert build_features("digits", weights=tmp_path / "w.safetensors").weights_hash == card["sha256"]


@pytest.fixture
def stripes(tmp_path: Path) -> Path:
    """A folder of 32x32 color images in ten classes that a few steps can separate: stripes of ten periods."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 6)):
        for period in range(2, 12):
            folder = tmp_path / "stripes" / split / f"{period:02}"
            folder.mkdir(parents=True)
            for index in range(count):
                phase, color = generator.integers(period), generator.integers(128, 256, 3)
                lit = (np.arange(32) + phase) % period < period / 2
                image = np.broadcast_to(lit[:, None, None] * color, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(image).save(folder / f"{index}.png")
    return tmp_path / "stripes"


SHORT = """
data: {augmentation: pad-crop, border: reflected, cutout: 8, mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
model: {backbone: feature-resnet}
train: {batch_size: 16, max_steps: STEPS, mixed_precision: none, label_smoothing: 0.1, checkpoint_every: 20}
optimizer: {learning_rate: 0.05, nesterov: true, weight_decay: 5.0e-4, warmup_steps: 4, schedule: linear}
"""


@pytest.fixture
def train_cifar10(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stripes: Path) -> Callable[..., dict]:
    """Trains on the stripes for a number of steps and writes NAME.safetensors."""

    def train(name: str, steps: int, seed: int = 0, reporter: Recorder | None = None) -> dict:
        (tmp_path / "short.yaml").write_text(SHORT.replace("STEPS", str(steps)))
        monkeypatch.setattr(module, "CIFAR10_RECIPE", str(tmp_path / "short.yaml"))
        options = Options(name="cifar10", data=str(stripes), out=tmp_path / f"{name}.safetensors", seed=seed)
        card = train_features(options, reporter or Recorder())
        assert card is not None
        return card

    return train


def test_color_features_are_trained_on_images_of_a_folder(
    train_cifar10: Callable[..., dict], tmp_path: Path, stripes: Path
) -> None:
    card = train_cifar10("w", 20)
    assert json.loads((tmp_path / "w.json").read_text()) == card
    assert card["test_accuracy"] > 0.2, "chance is 0.1"
    assert (card["train_images"], card["test_images"], card["source"]) == (300, 60, "stripes")
    assert card["recipe"]["model"]["backbone"] == "feature-resnet"
    extractor = build_features("cifar10", weights=tmp_path / "w.safetensors")
    assert extractor.num_features == 256
    assert (tmp_path / "w.safetensors").stat().st_size < 2_000_000
    # The card's accuracy is that of the half-precision weights in the file.
    images = open_images(stripes, split="test")
    logits = extractor.layers(torch.from_numpy(images.images))["logits"]
    assert (logits.argmax(1).numpy() == images.labels).mean() == pytest.approx(card["test_accuracy"])
    # The logits match the model that `dia-diffusion classify` trained and tested in float32.
    saved = load_classifier(tmp_path / "w.run")
    expected = saved.model(saved.prepare(torch.from_numpy(images.images)))
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.02)
    result = json.loads((tmp_path / "w.run" / "result.json").read_text())
    assert result["test_accuracy"] == pytest.approx(card["test_accuracy"], abs=2.5 / 60)


def test_a_stopped_training_of_color_features_resumes(train_cifar10: Callable[..., dict], tmp_path: Path) -> None:
    def stop(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    whole = train_cifar10("whole", 3, seed=1)
    with pytest.raises(Stopped, match="stopped after step 2"):
        train_cifar10("cut", 3, seed=1, reporter=Recorder(stop))
    assert not (tmp_path / "cut.safetensors").exists()
    with pytest.raises(InputError, match="seed: 1 -> 2"):
        train_cifar10("cut", 3, seed=2)
    assert train_cifar10("cut", 3, seed=1)["sha256"] == whole["sha256"], "the same bits"


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = tmp_path / "two"
    for name in ("a", "b"):
        (two / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(two / name / "0.png")
    (tmp_path / "there.json").touch()
    (tmp_path / "there.safetensors").touch()
    new, data = ["--out", tmp_path / "w.safetensors"], ["--data", two, "--test-data", two]
    for arguments, said in (
        (["digit", *new], "`NAME` must be one of digits, cifar10, got 'digit'"),
        (["digits", *new, "--seed", -1], "`--seed` must be 0 or more"),
        (["digits", "--out", tmp_path / "w.pt"], "`--out` must be a file ending in .safetensors"),
        (["digits", "--out", tmp_path / "there.safetensors"], "there.safetensors exists already"),
        (["cifar10", *new, *data], "`model.num_classes` must be 2, "),
        (["digits", *new, *data], "two must have images of 10 classes, got 2 classes"),
    ):
        assert said in script_error("train_features.py", Options, module.run, arguments, capsys)
    (tmp_path / "there.safetensors").unlink()
    arguments = ["digits", "--out", tmp_path / "there.safetensors"]
    assert "there.json exists" in script_error("train_features.py", Options, module.run, arguments, capsys)
    assert not (tmp_path / "w.run").exists()
