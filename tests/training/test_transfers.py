"""A step never waits for a GPU, checked on a CPU by running it on fake CUDA tensors, which hold no data."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from dia_diffusion.training.classification import ClassificationTask
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.task import Task
from dia_diffusion.training.trainer import Trainer
from tests.training import classify
from tests.training.conftest import TINY, Recorder

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
ASKING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default, aten.masked_select.default}
"""Operators that wait for a GPU's results."""


def _fakes_need_a_driver() -> bool:
    """Whether this torch (such as 2.9) needs the CUDA driver to index a fake CUDA tensor."""
    try:
        with FakeTensorMode():
            torch.empty(1, device=GPU)[:, None]
    except RuntimeError:
        return True
    return False


pytestmark = pytest.mark.skipif(_fakes_need_a_driver(), reason="indexing a fake CUDA tensor needs a CUDA driver here")


class Waits(TorchDispatchMode):
    """Records each operator that waits for the GPU, and each that creates float64 numbers on it."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.found: list[str] = []
        self.copies = 0
        """Copies from the CPU to the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self._as_fake, (args, kwargs or {}))
        if func is aten._pin_memory.default:  # fake tensors don't support it
            pinned = args[0].clone()
            pinned.is_pinned_copy = True
            return pinned
        if func is aten._fused_sgd_.default:  # this has no fake implementation either
            return None
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = any(tensor.device.type == "cuda" for tensor in tensors)
        if func in (aten._to_copy.default, aten.copy_.default):
            self._note_copy(func, tensors[-1], result, kwargs.get("non_blocking", len(args) > 2 and args[2]))
        elif func in ASKING and on_gpu:
            self.found.append(str(func))
        elif func is aten.index.Tensor and on_gpu:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool or index.device.type == "cpu" for index in indices):
                self.found.append(f"{func} by a mask or by CPU indices")
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cuda" and leaf.dtype == torch.float64:
                self.found.append(f"{func}: float64 on the GPU")
        return result

    def _as_fake(self, value: Any) -> Any:
        real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
        return self.fake.from_tensor(value) if real else value

    def _note_copy(self, func: Any, source: Tensor, result: Tensor, non_blocking: bool) -> None:
        kinds = source.device.type, result.device.type
        if kinds == ("cpu", "cuda"):
            self.copies += 1
            if not (non_blocking and hasattr(source, "is_pinned_copy")):
                self.found.append(f"{func} of {source.dtype} {tuple(source.shape)} from pageable memory, or blocking")
        elif kinds == ("cuda", "cpu"):
            self.found.append(f"{func} of {source.dtype} {tuple(source.shape)} to the CPU")


def waits_of_steps(experiment: Experiment | Task, monkeypatch: pytest.MonkeyPatch, steps: int = 2) -> Waits:
    """What a trainer's steps wait for on a fake GPU, without the backward pass, which needs a real one."""
    trainer = Trainer(experiment, Recorder())
    trainer.folder.unlock()
    draw = trainer.task.draw

    def real_draws(*args: Any) -> Any:
        with _disable_current_modes():
            return draw(*args)

    def backward(loss: Tensor) -> None:
        for parameter in trainer.parameters:
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(trainer.task, "draw", real_draws)
    monkeypatch.setattr(trainer.accelerator, "backward", backward)
    monkeypatch.setattr(Accelerator, "device", GPU)
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    waits = Waits(fake)
    with fake, waits:
        trainer.model.to(GPU)
        trainer.parameters = list(trainer.model.parameters())
        trainer._prepare(trainer.task.build_optimizer(trainer.model), None)
        waits.found.clear()
        waits.copies = 0
        for _ in range(steps):
            trainer.train_step()
    return waits


UNCOMPILED = ["--train.compile", "false"]


def test_a_diffusion_step_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    options = ["--noise.schedule", "cosine", "--noise.prediction_type", "v_prediction"]
    options += ["--noise.loss_weighting", "min-snr", "--train.accumulation", "2", "--train.clip_grad_norm", "1"]
    options += ["--model.num_classes", "10", "--data.label_dropout", "0.1", "--ssia.weight", "0.1"]
    experiment = read_experiment(str(recipe), ["--output", str(tmp_path / "run"), *UNCOMPILED, *options])
    waits = waits_of_steps(experiment, monkeypatch)
    assert waits.copies > 0 and not waits.found


def test_a_classification_step_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--train.label_smoothing", "0.1", "--data.cutout", "4"]
    options += ["--data.border", "reflected", "--train.channels_last", "true"]
    waits = waits_of_steps(ClassificationTask(classify.tiny(tmp_path, "run", *UNCOMPILED, *options)), monkeypatch)
    assert waits.copies > 0 and not waits.found
