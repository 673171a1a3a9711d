"""Callbacks, a metric and evaluations that a user adds to a training from outside."""

import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.tracking import TensorBoardTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dia_diffusion.cli.main import main
from dia_diffusion.errors import DivergedError, InputError, Stopped
from dia_diffusion.evaluation import evaluate
from dia_diffusion.evaluation.callback import EvaluatePipelines
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import EvaluationRecord, read_records
from dia_diffusion.io import step_folders
from dia_diffusion.training.callbacks import METRICS, Callback
from dia_diffusion.training.run_folder import read_metrics
from dia_diffusion.training.trainer import StepResult, Trainer
from tests.training.conftest import TINY
from tests.training.run_files import assert_same_run, metrics
from tests.training.test_processes import launch

SETTINGS = "{features: digits, num_samples: 80, sampler: ddim, steps: 2, reference_split: test}"


class Witness(Callback):
    """Records its calls, and how many pipelines and checkpoints exist at each."""

    def __init__(self, every: int, interrupt_at: int = 0):
        self.every, self.interrupt_at = every, interrupt_at
        self.calls: list[object] = []

    def start(self, trainer: Trainer) -> None:
        self.calls.append(("start", trainer.step))

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def __call__(self, trainer: Trainer, result: StepResult) -> None:
        pipelines, checkpoints = trainer.folder.pipelines, trainer.folder.checkpoints
        saved = [len(list(folder.glob("step-*"))) for folder in (pipelines, checkpoints)]
        self.calls.append((trainer.step, float(result.loss), bool(result.skipped), *saved))
        if trainer.step == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def end(self, trainer: Trainer, error: Exception | None) -> None:
        self.calls.append(("end", type(error).__name__))


def test_a_callback_of_ones_own(tiny, tmp_path: Path) -> None:
    """It receives each step's result after that step's pipeline and before its checkpoint are saved (every 3 steps)."""
    first = Witness(every=2, interrupt_at=4)
    with pytest.raises(Stopped):
        Trainer(tiny("run"), callbacks=[first]).run()
    second = Witness(every=3)
    Trainer(tiny("run"), callbacks=[second]).run()
    loss = {line["step"]: line["loss"] for line in metrics(tmp_path / "run")}
    assert first.calls == [("start", 0), (2, loss[2], False, 0, 0), (4, loss[4], False, 1, 1), ("end", "Stopped")]
    assert second.calls == [("start", 4), (6, loss[6], False, 2, 2), ("end", "NoneType")]


def test_a_callback_learns_that_the_training_diverged(tiny) -> None:
    witness = Witness(every=1)
    options = ("--optimizer.learning_rate", "1e30", "--optimizer.warmup_steps", "0", "--train.max_skipped_steps", "2")
    with pytest.raises(DivergedError):
        Trainer(tiny("run", *options), callbacks=[witness]).run()
    assert witness.calls[-2:] == [(2, witness.calls[-2][1], True, 0, 0), ("end", "DivergedError")]


def test_the_time_of_callbacks_is_not_in_images_per_second(tiny, tmp_path: Path) -> None:
    class Sleep(Callback):
        def __call__(self, trainer: Trainer, result: StepResult) -> None:
            time.sleep(0.5)

    Trainer(tiny("run", "--train.max_steps", "2"), callbacks=[Sleep()]).run()
    for line in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert line["images_per_second"] > 8 / 0.5, line


def test_a_tracker_that_fails_is_reported_once(tiny, train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*arguments: object, **options: object) -> None:
        raise ConnectionError("no route to host")

    for name in ("log", "log_images", "finish"):
        monkeypatch.setattr(TensorBoardTracker, name, no_network)
    options = ("--trackers", "[tensorboard]", "--train.sample_every", "3", "--samples.steps", "2")
    trainer = train(tiny("run", *options))
    assert trainer.step == 6 and len(metrics(tmp_path / "run")) == 6
    warnings = [text for text in trainer.progress.messages if text.startswith("warning")]
    assert warnings == ["warning: tracker tensorboard failed (no route to host); training continues"]


def test_a_tracker_that_can_not_start_is_refused(tiny, train, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_key(*arguments: object, **options: object) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(TensorBoardTracker, "__init__", no_key)
    with pytest.raises(InputError, match="`trackers` must be ones that can be started, got tensorboard: no API key"):
        train(tiny("run", "--trackers", "[tensorboard]"))


def test_a_metric_of_ones_own(tiny, train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METRICS, "_rows", dict(METRICS))  # so that later tests don't log it
    METRICS.register("loss squared", lambda trainer, result: float(result.loss) ** 2)
    METRICS.register("infinite", lambda trainer, result: float("inf"))
    train(tiny("run", "--train.log_every", "2"))
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line["loss squared"] == line["loss"] ** 2 and line["infinite"] is None for line in lines)


def test_grids_reach_the_trackers(finished, tmp_path: Path) -> None:
    grids = ("--train.sample_every", "3", "--samples.count", "4", "--samples.steps", "2")
    finished("run", *grids, "--trackers", "[tensorboard]")
    events = EventAccumulator(str(tmp_path / "run" / "dia-diffusion"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [3, 6]
    logged = tmp_path / "logged.png"
    logged.write_bytes(events.Images("samples")[1].encoded_image_string)
    grid = np.asarray(Image.open(tmp_path / "run" / "samples" / "step-00000006.png").convert("RGB"))
    assert np.array_equal(np.asarray(Image.open(logged).convert("RGB")), grid)
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_a_run_is_measured_during_training(tiny, tmp_path: Path) -> None:
    """A run that is stopped and resumed has one record per pipeline, the same as `fid` measures afterwards."""
    file, run = tmp_path / "mine.yaml", tmp_path / "run"
    file.write_text(SETTINGS)
    protocol = EvalProtocol.read(str(file))
    with pytest.raises(Stopped):
        Trainer(tiny("run"), callbacks=[EvaluatePipelines(protocol), Witness(3, interrupt_at=3)]).run()
    last = run / "checkpoints" / "step-00000003"
    last.rename(last.with_name("gone"))  # so that its pipeline is written and evaluated again
    trainer = Trainer(tiny("run"), callbacks=[EvaluatePipelines(protocol)])
    assert trainer.step == 0
    trainer.run()
    records = read_records(run / "evaluations.jsonl")
    assert [record.step for record in records] == [3, 6]

    record_file = tmp_path / "fid.jsonl"
    assert main(["fid", str(run), "--every-step", "--protocol", str(file), "--record", str(record_file)]) == 0

    def compared(record: EvaluationRecord) -> dict[str, object]:
        return {key: value for key, value in record.to_dict().items() if key not in ("time", "seconds")}

    assert [compared(record) for record in records] == [compared(record) for record in read_records(record_file)]
    logged = [line for line in read_metrics(run / "metrics.jsonl") if "FD(digits)" in line]
    assert [(line["step"], line["FD(digits)"]) for line in logged] == [(r.step, r.distance) for r in records]
    for record in records:  # step 3 was measured before its pipeline was written again
        card = (run / f"pipelines/step-{record.step:08d}/README.md").read_text()
        assert f"| FD(digits) | {record.distance:.3f} |" in card
    assert not (run / "evaluations.unfinished").exists()


def test_a_run_killed_in_its_evaluations_ends_like_an_uninterrupted_one(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text(SETTINGS)

    def run(name: str, place: str = "measure_together", killed_at: int = 0) -> None:
        """killed_at: the evaluation, counted from 1, in which this process is killed."""
        real, calls = getattr(evaluate, place), iter(range(1, 9))

        def held(*arguments: Any, **options: Any) -> Any:
            if next(calls) == killed_at:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) if killed_at else nullcontext():
            patch.setattr(evaluate, place, held)
            Trainer(tiny(name), callbacks=[EvaluatePipelines(EvalProtocol.read(str(tmp_path / "mine.yaml")))]).run()

    run("whole")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    # Each start after the first repeats the evaluation that was killed before it.
    for place, killed_at, step in (("measure_together", 1, 3), ("update_card", 2, 6), ("update_card", 1, 6)):
        run("cut", place, killed_at)
        assert max(step_folders(cut / "checkpoints")) == step
    run("cut")
    run("cut")
    records = [[(r.step, r.distance) for r in read_records(path / "evaluations.jsonl")] for path in (whole, cut)]
    assert records[0] == records[1] and [step for step, _ in records[0]] == [3, 6]
    assert_same_run(whole, cut)


def test_every_nth_step_and_the_last_are_measured_by_all_processes(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(SETTINGS)
    options = ["--train.checkpoint_every", "1", "--train.max_steps", "3", "--evaluate", str(file), "--evaluate-every=2"]
    two = launch(tmp_path, "two", 2, *options)
    one = ["train", "--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "one"), *options]
    assert main(one) == 0
    distances = [
        [(record.step, record.distance) for record in read_records(run / "evaluations.jsonl")]
        for run in (tmp_path / "one", two)
    ]
    assert [step for step, _ in distances[0]] == [step for step, _ in distances[1]] == [2, 3]
    assert [d for _, d in distances[0]] == pytest.approx([d for _, d in distances[1]], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ("", ["--evaluate-every", "2"], "must be a multiple of train.checkpoint_every, 3, got 2"),
        ("", ["--evaluate-every", "0"], "`--evaluate-every` must be 1 or more"),
        ("", ["--evaluate-every", "9" * 5000], "`--evaluate-every` must be 1 or more"),
        ("features: fog", [], "`features` must be one of digits, cifar10, inception"),
        ("classes: [0]", [], "class"),
        ("reference_count: 7", [], "must have 7 images for protocol mine, got 596"),
    ],
)
def test_invalid_evaluations_are_refused_before_the_first_step(
    change: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    settings = yaml.safe_load(SETTINGS) | (yaml.safe_load(change) or {})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    command = ["train", "--config", tmp_path / "tiny.yaml", "--output", tmp_path / "run"]
    assert main([str(word) for word in [*command, "--evaluate", tmp_path / "mine.yaml", *options]]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_training_continues_without_a_distance_if_measuring_fails(tiny, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine.yaml").write_text(SETTINGS)
    callback = EvaluatePipelines(EvalProtocol.read(str(tmp_path / "mine.yaml")))
    trainer = Trainer(tiny("run"), callbacks=[callback])

    def no_memory(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("no memory for the features")

    monkeypatch.setattr("dia_diffusion.evaluation.evaluate.measure_together", no_memory)
    trainer.run()
    assert trainer.step == 6 and not (tmp_path / "run" / "evaluations.jsonl").exists()
    assert not [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "FD(digits)" in line]
