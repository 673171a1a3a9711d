"""Training of classifiers, compared with a plain loop, with interrupted runs and with two processes; how runs end."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.v2 import functional as transforms

from dia_diffusion.cli.main import main
from dia_diffusion.data import open_images
from dia_diffusion.errors import DivergedError, InputError, Stopped
from dia_diffusion.models.classifier_config import BackboneConfig
from dia_diffusion.models.classifiers import build_classifier, load_classifier
from dia_diffusion.sweeps.accuracies import read_result
from dia_diffusion.training.augmentation import DOWN, MIRROR, RIGHT, draw_images
from dia_diffusion.training.classification import ClassificationTask
from dia_diffusion.training.config import ClassifyExperiment, Experiment
from dia_diffusion.training.randomness import WEIGHTS, derive
from dia_diffusion.training.recipe import override, read_experiment, recipes_folder
from dia_diffusion.training.run_folder import refuse_changes
from dia_diffusion.training.trainer import Trainer
from tests.processes import on_two_processes, start_connected
from tests.training.classify import tiny, train
from tests.training.run_files import assert_same_run, assert_same_tensors, cut_off, metrics, weights


def test_losses_and_weights_equal_a_plain_loop(in_float64, tmp_path: Path) -> None:
    """Six steps with torchvision's crops, one image at a time, and torch's SGD and MultiStepLR."""
    train(tiny(tmp_path, "run", "--train.label_smoothing", "0.1"))
    torch.manual_seed(derive(0, WEIGHTS))
    model = build_classifier(
        BackboneConfig(backbone="cifar-resnet8-basic", sample_size=8, num_classes=10, attention="dia-lstm")
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.1)
    digits = open_images("digits", size=8, channels=3)
    losses = []
    for step in range(6):
        draws = draw_images(0, step, 16, len(digits))
        batch = []
        for index, row in zip(draws.indices, draws.uniform.tolist(), strict=True):
            image = torch.from_numpy(digits.images[index])
            image = transforms.hflip(image) if row[MIRROR] < 0.5 else image
            image = transforms.crop(transforms.pad(image, [4]), int(row[DOWN] * 9), int(row[RIGHT] * 9), 8, 8)
            image = transforms.to_dtype(image, torch.float64, scale=True)
            batch.append(transforms.normalize(image, [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]))
        logits = model(torch.stack(batch))
        loss = F.cross_entropy(logits, torch.from_numpy(digits.labels[draws.indices]), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            optimizer.param_groups[0]["lr"] = 0.025  # the warm-up's first step
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.05 if step == 0 else optimizer.param_groups[0]["lr"]
        schedule.step()
        losses.append(loss.item())
    found = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert found == pytest.approx(losses, rel=1e-9)
    torch.testing.assert_close(weights(tmp_path / "run", 6), dict(model.state_dict()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("own", [(), ("--optimizer.name", "adamw", "--optimizer.nesterov", "false")], ids=str)
def test_a_run_resumes_bit_for_bit(own: tuple[str, ...], tmp_path: Path) -> None:
    train(tiny(tmp_path, "whole", *own))
    cut = cut_off(Path(shutil.copytree(tmp_path / "whole", tmp_path / "cut")))
    train(tiny(tmp_path, "cut", *own))
    assert_same_run(cut, tmp_path / "whole")
    assert any("running_var" in name for name in weights(tmp_path / "whole", 6))
    assert not (tmp_path / "whole" / "checkpoints" / "step-00000006" / "ema.safetensors").exists()


def test_the_saved_classifier_loads_and_has_the_tested_accuracy(tmp_path: Path) -> None:
    options = "--train.log_every 20 --train.evaluate_every 30 --optimizer.milestones [] --data.augmentation none"
    train(tiny(tmp_path, "run", "--train.max_steps", "60", *options.split()))
    saved = load_classifier(tmp_path / "run")
    digits = open_images("digits", size=8, channels=3, split="test")
    choices = saved.model(saved.prepare(torch.from_numpy(digits.images))).argmax(1).numpy()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test_accuracy"] == pytest.approx(np.mean(choices == digits.labels), abs=1e-9)
    assert result["test_accuracy"] > 0.3, "chance is 0.1"
    for digit in range(10):
        here = digits.labels == digit
        assert result[f"test_accuracy/{digit}"] == pytest.approx(np.mean(choices[here] == digit))
    assert result["diverged_at"] is None and result["step"] == 60
    assert result["parameters"] == sum(parameter.numel() for parameter in saved.model.parameters())
    tested = [line for line in metrics(tmp_path / "run") if "test_accuracy" in line]
    assert [line["step"] for line in tested] == [30, 60] and tested[1]["test_accuracy"] == result["test_accuracy"]
    assert saved.class_names == list("0123456789") and saved.training["step"] == 60
    stored = load_file(tmp_path / "run" / "classifiers" / "step-00000060" / "model.safetensors")
    assert sum("attention_units" in name for name in stored) == 3 * 8, "a stage's unit once"
    with pytest.raises(InputError, match="must be a classifier folder or a run"):
        load_classifier(tmp_path)
    (tmp_path / "run" / "classifiers" / "step-00000060" / "model.safetensors").write_text("cut")
    with pytest.raises(InputError, match="truncated"):
        load_classifier(tmp_path / "run")


TO_DIVERGE = ["--optimizer.learning_rate", "1e30", "--optimizer.warmup_steps", "0", "--train.max_skipped_steps", "3"]


def test_a_run_that_diverges_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny(tmp_path, "run")
    command = ["classify", "--config", str(tmp_path / "classify.yaml"), "--output", str(tmp_path / "run")]
    assert main([*command, *TO_DIVERGE]) == 1
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and "not finite at step 2" in said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["diverged_at"] == 2 and "test_accuracy" not in result
    assert metrics(tmp_path / "run")[-1]["step"] == 3 and read_result(tmp_path / "run").diverged_at == 2
    with pytest.raises(DivergedError) as diverged:  # studies catch it
        train(tiny(tmp_path, "another", *TO_DIVERGE))
    assert diverged.value.step == 2


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Class folders of images of several sizes, in train/ and test/."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for number in range(4):
                place = tmp_path / "photos" / split / name / f"{number}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                height, width = random.integers(12, 40, 2)
                Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(place)
    return tmp_path / "photos"


def of_files(folder: Path, photos: Path, name: str, *overrides: str) -> ClassifyExperiment:
    options = ("--data.source", str(photos), "--data.augmentation", "resized-crop", "--model.num_classes", "2")
    return tiny(folder, name, *options, "--model.sample_size", "16", "--train.batch_size", "4", *overrides)


def test_files_are_decoded_for_their_step(tmp_path: Path, photos: Path) -> None:
    """A resumed run, with a first batch that was not decoded ahead, equals an uninterrupted one."""
    train(of_files(tmp_path, photos, "whole"))
    with pytest.raises(Stopped):
        train(
            of_files(tmp_path, photos, "cut"), lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 2 else None
        )
    train(of_files(tmp_path, photos, "cut"))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert {"test_accuracy/cat", "test_accuracy/dog"} <= metrics(tmp_path / "whole")[-1].keys()


def test_a_broken_file_is_named_by_the_process_that_reads_it(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine's first process, which reports errors that all processes have, may never read that file."""
    (photos / "train" / "dog" / "2.png").write_text("no image")
    experiment = of_files(tmp_path, photos, "run")

    def run(options: object) -> None:
        try:
            train(experiment)
        finally:
            monkeypatch.setenv("LOCAL_RANK", "1")  # not earlier: there is no process to connect to

    monkeypatch.setattr("dia_diffusion.cli.classify.run", run)
    assert main(["classify", "--config", "cifar100_resnet"]) == 2
    assert "2.png can't be read" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(tmp_path: Path, photos: Path) -> None:
    def refused(message: str, *overrides: str) -> None:
        with pytest.raises(InputError, match=message):
            Trainer(ClassificationTask(tiny(tmp_path, "run", *overrides)))

    refused("`model.num_classes` must be 10, .* got 3", "--model.num_classes", "3")
    refused("the test images are the training images", "--data.test_split", "train", "--data.test_source", "digits")
    refused("must be 2, the number of classes", "--data.source", str(photos))
    refused("`model.backbone` must be one of", "--model.backbone", "resnet99")
    refused("`optimizer.nesterov` must be false without sgd", "--optimizer.momentum", "0")
    refused("did you mean `model.backbone`", "--model.backbon", "resnet18")
    refused(r"weights must fit into \d+ GiB of memory, got", "--model.backbone", "cifar-wrn16-999")
    refused("`train.sync_batchnorm` must be false without CUDA", "--train.sync_batchnorm", "true")
    refused("`data.mean` must be a list of 3", "--data.mean", "[0.5]")
    refused("`data.border` must be", "--data.border", "reflected", "--data.augmentation", "none")
    refused("`data.cutout` must be 0 or more, got -1", "--data.cutout", "-1")
    assert not (tmp_path / "run").exists()
    train(tiny(tmp_path, "run"))
    refused(r"optimizer\.momentum: 0\.9 -> 0\.8", "--optimizer.momentum", "0.8")
    with pytest.raises(InputError, match="holds a run of dia-diffusion classify; choose another output"):
        refuse_changes(tiny(tmp_path, "run").to_dict(), Experiment(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    refused("has classifiers and no checkpoint")


@pytest.mark.parametrize("path", sorted(recipes_folder(ClassifyExperiment).glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes(path: Path) -> None:
    experiment = read_experiment(path.stem, kind=ClassifyExperiment)
    assert Path(experiment.output).name == path.stem
    ClassificationTask(override(experiment, {"model.attention": "dia-lstm"}))
    assert all(milestone < experiment.train.max_steps for milestone in experiment.optimizer.milestones)


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    without_norms = ("--model.norm", "none")  # each process's norms would see only part of the batch
    train(tiny(tmp_path, "one", *without_norms))
    command = ["classify", "--config", tmp_path / "classify.yaml", *without_norms, "--output", tmp_path / "two"]
    for process in start_connected(*command, logs=tmp_path):
        assert process.wait() == 0, process.text()
    alone, together = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(alone) == len(together) == 8
    for one, two in zip(alone, together, strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def trained(experiment: ClassifyExperiment) -> None:
    train(experiment)


def test_the_classifier_that_is_saved_is_the_one_that_was_tested(tmp_path: Path) -> None:
    """Each process normalizes its own images, so the processes' BatchNorm statistics differ."""
    experiment = tiny(tmp_path, "run", "--train.evaluate_every", "1")
    assert on_two_processes(trained, experiment) == [None, None]
    images = open_images("digits", split="test", size=8, channels=3)
    labels = torch.from_numpy(images.labels)
    tested = {line["step"]: line for line in metrics(tmp_path / "run") if "test_loss" in line}
    assert len(tested) == 6
    for step in (3, 6):
        saved = load_classifier(tmp_path / "run" / "classifiers" / f"step-{step:08d}")
        logits = saved.model(saved.prepare(torch.from_numpy(images.images)))
        assert tested[step]["test_accuracy"] == int((logits.argmax(1) == labels).sum()) / len(labels)
        assert tested[step]["test_loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)


def test_testing_does_not_change_the_training(tmp_path: Path) -> None:
    for name, every in (("tested", "1"), ("untested", "0")):
        train(tiny(tmp_path, name, "--train.evaluate_every", every))
    assert_same_tensors(tmp_path / "tested", tmp_path / "untested")
