"""SSIA in classifiers' training: the loss that is added, folders without heads, resuming, and processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dia_diffusion.errors import InputError
from dia_diffusion.models.classifiers import load_classifier
from dia_diffusion.reading import read_yaml
from dia_diffusion.training.classification import ClassificationTask
from dia_diffusion.training.run_folder import read_metrics
from dia_diffusion.training.ssia import HEADS, without_heads
from dia_diffusion.training.trainer import Trainer
from tests.training.classify import tiny, train
from tests.training.conftest import Recorder
from tests.training.test_classification_processes import metrics

DEEPER = ("--model.backbone", "cifar-resnet14-basic")  # two blocks a stage
GUIDED = (*DEEPER, "--ssia.weight", "0.5")


def weights(run: Path, folder: str = "checkpoints") -> dict[str, torch.Tensor]:
    return load_file(run / folder / "step-00000006" / "model.safetensors")


@pytest.mark.parametrize("unit", ["none", "dia-lstm"])
def test_saved_classifiers_have_no_heads_and_the_trained_function(tmp_path: Path, unit: str) -> None:
    options = ("--model.attention", unit, "--train.channels_last", "false")  # which would round otherwise
    plain = train(tiny(tmp_path, "plain", *DEEPER, *options))
    guided = train(tiny(tmp_path, "guided", *GUIDED, *options))
    expected, found = (weights(tmp_path / run, "classifiers") for run in ("plain", "guided"))
    assert {name: w.shape for name, w in found.items()} == {name: w.shape for name, w in expected.items()}
    assert any(not torch.equal(found[name], expected[name]) for name in found if "stages" in name)
    assert sum(name.startswith(HEADS) for name in weights(tmp_path / "guided")) == 3 * 4  # two linear layers a stage
    assert guided.task.num_parameters == plain.task.num_parameters
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(load_classifier(tmp_path / "guided").model(x), guided.model.eval()(x))


def test_first_loss_is_the_twins_and_the_weighted_loss(tmp_path: Path) -> None:
    runs = {"plain": DEEPER, "half": GUIDED, "one": (*DEEPER, "--ssia.weight", "1")}
    first = {}
    for name, options in runs.items():
        train(tiny(tmp_path, name, *options, "--train.max_steps", "1"))
        first[name] = read_metrics(tmp_path / name / "metrics.jsonl")[0]["loss"]
    assert 0 < first["half"] - first["plain"] < 0.5  # a squared error of two numbers in (0, 1)
    assert first["one"] - first["plain"] == pytest.approx(2 * (first["half"] - first["plain"]), rel=1e-4)


def test_weight_zero_is_the_same_training(tmp_path: Path) -> None:
    train(tiny(tmp_path, "a", *DEEPER))
    train(tiny(tmp_path, "b", *DEEPER, "--ssia.weight", "0", "--ssia.reduction", "3"))
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_resumes_exactly_and_refuses_other_weights(tmp_path: Path) -> None:
    train(tiny(tmp_path, "whole", *GUIDED))
    train(tiny(tmp_path, "parts", *GUIDED, "--train.max_steps", "3"))
    assert read_yaml(tmp_path / "parts" / "config.yaml", "recipe", "")["ssia"] == {"weight": 0.5, "reduction": 4}
    with pytest.raises(InputError, match=r"ssia.weight: 0.5 -> 0.25"):
        Trainer(ClassificationTask(tiny(tmp_path, "parts", *DEEPER, "--ssia.weight", "0.25")), Recorder())
    train(tiny(tmp_path, "parts", *GUIDED))
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_first_weights_are_the_twins(tmp_path: Path) -> None:
    def first(name: str, *options: str) -> dict[str, Any]:
        torch.manual_seed(0)
        return ClassificationTask(tiny(tmp_path, name, *options)).build_model().state_dict()

    torch.testing.assert_close(without_heads(first("a", *GUIDED)), dict(first("b", *DEEPER)), rtol=0, atol=0)


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    alone, together = (metrics(tmp_path, processes, *GUIDED) for processes in (1, 2))
    for one, two in zip(alone, together, strict=True):
        for key in one.keys() - {"images_per_second", "peak_memory_mib"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4), (key, one["step"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--ssia.weight", "-1"), r"`ssia.weight` must be 0 or more, got -1"),
        (("--ssia.weight", ".inf"), "`ssia.weight` must be a finite number, got inf"),
        ((*GUIDED, "--ssia.reduction", "3"), "must divide the blocks' widths, 16, 32, 64, got 3"),
        (("--ssia.weight", "1"), "a CifarResNet without two blocks of one width in a row"),
        (("--ssia.wieght", "1"), r"did you mean `ssia.weight`"),
    ],
)
def test_refusals(tmp_path: Path, options: tuple[str, ...], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Trainer(ClassificationTask(tiny(tmp_path, "refused", *options)), Recorder())
