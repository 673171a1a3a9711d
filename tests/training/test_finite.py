"""Steps without a finite loss or gradient change nothing, are counted, and end a run after too many in a row."""

import json
import os
from collections.abc import Callable, Container
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dia_diffusion.errors import DivergedError
from dia_diffusion.training.checkpoint import optimizer_tensors
from dia_diffusion.training.classification import ClassificationTask
from dia_diffusion.training.diffusion import DiffusionTask
from dia_diffusion.training.finite import FiniteWatch
from dia_diffusion.training.optimizer import learning_rate
from dia_diffusion.training.trainer import StepResult, Trainer
from tests.training import classify
from tests.training.conftest import Recorder
from tests.training.run_files import metrics, weights
from tests.training.test_processes import launch


def spoil(monkeypatch: pytest.MonkeyPatch, steps: Container[int], how: Callable[[Tensor], Tensor]) -> None:
    """Changes the loss of some steps, counted from 1."""
    loss, train_step = DiffusionTask.loss, Trainer.train_step

    def noting(trainer: Trainer) -> StepResult:
        trainer.task.at = trainer.step + 1
        return train_step(trainer)

    monkeypatch.setattr(Trainer, "train_step", noting)
    monkeypatch.setattr(
        DiffusionTask,
        "loss",
        lambda task, *of_step: how(loss(task, *of_step)) if task.at in steps else loss(task, *of_step),
    )


def states(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of all state that a step may change."""
    kept = {f"model/{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    kept |= {f"optimizer/{n}": t for n, t in optimizer_tensors(trainer.optimizer.optimizer, trainer.model).items()}
    if trainer.ema is not None:
        kept |= {f"ema/{n}": t for n, t in zip(trainer.names, trainer.ema.parameters, strict=True)}
    return {name: tensor.detach().clone() for name, tensor in kept.items()}


def states_of_steps(trainer: Trainer) -> list[dict[str, Tensor]]:
    """Trains to the end; returns the state before the first step and after each step."""
    found = [states(trainer)]
    trainer.progress.at_step = lambda step: found.append(states(trainer))
    trainer.run()
    return found


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of tensors that are equal in both states; an optimizer's initial zeros equal a missing tensor."""
    none = {name: torch.zeros_like(tensor) for name, tensor in after.items() if name not in before}
    return {name for name, tensor in after.items() if torch.equal({**before, **none}[name], tensor)}


@pytest.mark.parametrize(
    "how",
    [lambda loss: loss * float("nan"), lambda loss: loss + float("inf"), lambda loss: loss * 1e30 * 1e30],
    ids=["nan", "infinite with a finite gradient", "infinite"],
)
def test_a_step_that_is_not_finite_touches_nothing(how, tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spoil(monkeypatch, {1, 4}, how)
    found = states_of_steps(Trainer(tiny("run"), Recorder()))
    for step in range(1, 7):
        unchanged = same(found[step - 1], found[step])
        if step in (1, 4):
            assert unchanged == found[step].keys()
        else:
            assert not unchanged & {"model/norm.weight", "ema/norm.weight", "optimizer/norm.weight/exp_avg"}
    assert float(found[6]["optimizer/norm.weight/step"]) == 4
    lines = metrics(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [1, 1, 1, 2, 2, 2]
    assert [line["step"] for line in lines if line["loss"] is None] == [1, 4]


def test_a_step_that_is_not_finite_does_not_touch_a_batchnorm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ClassificationTask.prepare

    def bad_images(task: ClassificationTask, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        return batch(task, pixels, dtype) * (float("nan") if trainer.model.training and trainer.step in (0, 3) else 1)

    monkeypatch.setattr(ClassificationTask, "prepare", bad_images)
    trainer = Trainer(ClassificationTask(classify.tiny(tmp_path, "run")), Recorder())
    found = states_of_steps(trainer)
    for step in range(1, 7):
        if step in (1, 4):
            assert same(found[step - 1], found[step]) == found[step].keys()
        else:
            assert not same(found[step - 1], found[step]) & {name for name in found[step] if "running_mean" in name}
    assert all(tensor.isfinite().all() for tensor in found[6].values())


def test_too_many_skipped_steps_in_a_row_end_the_run(tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spoil(monkeypatch, {2, 3, 5, 6}, lambda loss: loss * float("nan"))
    Trainer(tiny("fewer", "--train.max_skipped_steps", "3"), Recorder()).run()
    assert metrics(tmp_path / "fewer")[-1]["skipped_steps"] == 4
    with pytest.raises(DivergedError, match="not finite at step 2 and the 1 after it: loss nan") as error:
        Trainer(tiny("as many", "--train.max_skipped_steps", "2"), Recorder()).run()
    assert error.value.step == 2
    assert [line["step"] for line in metrics(tmp_path / "as many")] == [1, 2]


def test_the_error_names_the_first_module_that_is_not_finite(tiny) -> None:
    trainer = Trainer(tiny("run", "--train.max_skipped_steps", "2"), Recorder())

    def overflow(step: int) -> None:
        if step == 4:
            torch.nn.init.constant_(trainer.model.out_blocks[0].mlp.fc1.bias, float("inf"))

    trainer.progress.at_step = overflow
    with pytest.raises(DivergedError) as error:
        trainer.run()
    rate = learning_rate(trainer.task.optimizer_config, 4, 6)
    for expected in ("step 5", f"learning rate {rate:.4g}", "first not finite: output of out_blocks.0.mlp.fc1;"):
        assert expected in str(error.value)
    assert "loss nan, gradient norm nan" in str(error.value)


def test_a_run_driven_into_divergence_keeps_its_last_finite_weights(tiny, tmp_path: Path) -> None:
    options = ("--optimizer.learning_rate", "1e30", "--optimizer.warmup_steps", "0", "--train.checkpoint_every", "1")
    with pytest.raises(DivergedError, match=r"at step 2 and the 3 after.* rate 1e\+30, first not finite: output of"):
        Trainer(tiny("run", *options, "--train.max_skipped_steps", "4"), Recorder()).run()
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert kept[-1].name == "step-00000004"
    for name in ("model", "ema", "optimizer"):
        first, last = weights(tmp_path / "run", 2, name), weights(tmp_path / "run", 4, name)
        assert all(torch.equal(first[key], last[key]) and last[key].isfinite().all() for key in last)


def test_the_count_of_skipped_steps_is_kept_on_resuming(tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spoil(monkeypatch, {2, 5}, lambda loss: loss * float("nan"))
    Trainer(tiny("run", "--train.max_steps", "3"), Recorder()).run()
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert state["skipped_steps"] == 1
    Trainer(tiny("run"), Recorder()).run()
    assert [line["skipped_steps"] for line in metrics(tmp_path / "run")] == [0, 1, 1, 1, 2, 2]


def spoil_the_last_process() -> None:
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        spoil(pytest.MonkeyPatch(), [3], lambda loss: loss + float("inf"))


def test_all_processes_skip_what_is_not_finite_on_one(
    tiny, train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = launch(tmp_path, "two", 2, prepare=spoil_the_last_process)
    spoil(monkeypatch, [3], lambda loss: loss + float("inf"))
    train(tiny("one"))
    assert [line["skipped_steps"] for line in metrics(two)] == [0, 0, 1, 1, 1, 1]
    alone, shared = weights(tmp_path / "one", 6), weights(two, 6)
    assert max(float((alone[name] - shared[name]).abs().max()) for name in alone) < 1e-5


def test_a_full_streak_continues_until_it_is_checked(tmp_path: Path) -> None:
    """As on a GPU between two log lines: steps after the streak are not applied either."""
    watch = FiniteWatch(torch.device("cpu"), 2, 0, scaled=False)
    losses = [1.0, float("nan"), float("inf"), 1.0, 1.0]
    skipped = [bool(watch.note(step, torch.tensor(loss), torch.tensor(1.0))) for step, loss in enumerate(losses)]
    assert skipped == [False, True, True, True, True] and int(watch.skipped) == 2
    streak = watch.streak()
    assert streak is not None and streak.step == 1
