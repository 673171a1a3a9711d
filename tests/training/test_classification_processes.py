"""Two connected processes (gloo) train the classifier that one does, and test the one that they save."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dia_diffusion.data import open_images
from dia_diffusion.models.classifiers import load_classifier
from dia_diffusion.training.config import ClassifyExperiment
from dia_diffusion.training.run_folder import read_metrics
from tests.processes import start_connected
from tests.training.classify import tiny, train
from tests.training.run_files import weights
from tests.two_processes import on_two_processes


def metrics(tmp_path: Path, processes: int, *overrides: str) -> list[dict]:
    output = tmp_path / str(processes)
    tiny(tmp_path, "run")
    command = ["classify", "--config", tmp_path / "classify.yaml", "--model.norm", "none", "--output", output]
    for process in start_connected(*command, *overrides, logs=tmp_path, processes=processes):
        assert process.wait() == 0, process.text()
    return read_metrics(output / "metrics.jsonl")


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """Without norms, which see a part of the batch each."""
    alone, together = metrics(tmp_path, 1), metrics(tmp_path, 2)
    assert len(alone) == len(together) == 8
    for one, two in zip(alone, together, strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {"images_per_second", "peak_memory_mib"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4), (key, one["step"])


def trained(experiment: ClassifyExperiment) -> None:
    train(experiment)


def test_the_classifier_that_is_saved_is_the_one_that_was_tested(tmp_path: Path) -> None:
    """Each process normalizes its own images, so that their BatchNorms' statistics differ."""
    experiment = tiny(tmp_path, "run", "--train.evaluate_every", "1")
    assert on_two_processes(trained, experiment) == [None, None]
    images = open_images("digits", split="test", size=8, channels=3)
    labels = torch.from_numpy(images.labels)
    tested = {line["step"]: line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "test_loss" in line}
    assert len(tested) == 6
    for step in (3, 6):
        saved = load_classifier(tmp_path / "run" / "classifiers" / f"step-{step:08d}")
        logits = saved.model(saved.prepare(torch.from_numpy(images.images)))
        assert tested[step]["test_accuracy"] == int((logits.argmax(1) == labels).sum()) / len(labels)
        assert tested[step]["test_loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)

    # Testing doesn't change the training.
    assert on_two_processes(trained, tiny(tmp_path, "untested", "--train.evaluate_every", "0")) == [None, None]
    one, other = weights(tmp_path / "run", 6), weights(tmp_path / "untested", 6)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
