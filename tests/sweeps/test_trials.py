"""Trials: known outcomes, held-out losses computed by hand, and what a resumed command repeats."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dia_diffusion import UViTPipeline
from dia_diffusion.cli.main import main
from dia_diffusion.data import open_images
from dia_diffusion.errors import DivergedError, InputError, Stopped
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.sweeps.outcome import constant_loss, finished, open_held_out, train_trials
from dia_diffusion.sweeps.sweep import Run
from dia_diffusion.sweeps.trials import (
    base_recipe,
    make_trial,
    placement_trials,
    placements,
    run_trials,
    stability_trials,
    summarize_placement,
    summarize_stability,
)
from dia_diffusion.training.randomness import draw_step
from dia_diffusion.training.trainer import Trainer
from tests.processes import Child, wait_for
from tests.training.conftest import TINY, Recorder
from tests.training.run_files import make_version_1


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("random_flip: true", "random_flip: false"))
    return str(path)


@pytest.fixture
def trial(recipe: str, tmp_path: Path) -> Any:
    def make(name: str, **keys: Any) -> Run:
        seed = keys.pop("seed", 0)
        return make_trial(name, {"unit": name}, tmp_path / "out", base_recipe(name, recipe, keys), seed)

    return make


def measure(trials: list[Run]) -> list[dict[str, Any]]:
    """Trains and measures in this process, as a child process does."""
    held_out = open_held_out(trials[0].experiment, None, 32, 4)
    train_trials([trial.experiment for trial in trials if not finished(trial)], held_out, Recorder())
    return check(trials)


def check(trials: list[Run], num_times: int = 4) -> list[dict[str, Any]]:
    """The existing results, checked as they are before training."""
    held_out = open_held_out(trials[0].experiment, None, 32, num_times)
    return run_trials(trials, held_out, 1, lambda *_: None)


def test_best_constant_has_the_least_loss() -> None:
    """Least squares written out for each target: x_0, the noise, and v with its weight."""
    torch.manual_seed(0)
    images = torch.rand(400, 1, 3, 3) * 2 - 1
    draws = draw_step(0, 0, 400, 400, (1, 3, 3))
    draws = type(draws)(**{**vars(draws), "uniform": torch.full((400,), 0.3)})
    u = 0.3
    alpha = np.exp(-(0.1 * u + 19.9 * u * u / 2) / 2)
    sigma = np.sqrt(1 - alpha**2)
    x, noise = images.numpy().astype(np.float64), draws.noise.numpy().astype(np.float64)
    snr = alpha**2 / sigma**2
    for kind, weighting, target, weight in (
        ("sample", "uniform", x, 1.0),
        ("epsilon", "uniform", noise, 1.0),
        ("v_prediction", "min-snr", alpha * noise - sigma * x, min(snr, 5.0) / (snr + 1)),
    ):
        process = NoiseProcess("vp-continuous", kind, weighting)
        squares = ((target - target.mean(axis=0)) ** 2).sum(axis=0) / 399  # 399 of 400 images: unbiased
        assert float(constant_loss(process, images, draws)) == pytest.approx(weight * squares.mean(), rel=1e-4)


def test_held_out_loss_is_that_of_the_pipeline_on_the_test_part(trial: Any) -> None:
    one = trial("one", **{"noise.prediction_type": "sample"})
    result = measure([one])[0]
    unet = UViTPipeline.from_pretrained(one.folder / "pipelines" / "step-00000006").unet.eval()
    held_out = torch.from_numpy(np.array(open_images("digits", size=8, channels=1, split="test").images))
    draws = draw_step(0, 0, 32, len(held_out), (1, 8, 8))
    x, squares = held_out[draws.indices].double() / 127.5 - 1, []
    for u in (0.125, 0.375, 0.625, 0.875):
        alpha = np.exp(-(0.1 * u + 19.9 * u * u / 2) / 2)
        noisy = alpha * x + np.sqrt(1 - alpha**2) * draws.noise.double()
        with torch.no_grad():
            squares.append((unet(noisy.float(), 999 * u).sample.double() - x).square().mean().item())
    assert result["held_out_loss"] == pytest.approx(np.mean(squares), rel=1e-5)


def test_outcomes(trial: Any) -> None:
    # A learning rate near zero keeps the initial weights, which predict something other than the mean.
    still = trial("still", **{"optimizer.learning_rate": 1e-12, "noise.prediction_type": "sample"})
    learns = {"optimizer.learning_rate": 0.01, "optimizer.warmup_steps": 0, "train.max_steps": 80, "ema.warmup": True}
    good = trial("good", **learns)  # at most times the noise is nearly the sample itself, which is quickly learned
    burst = {"optimizer.learning_rate": 1e30, "optimizer.warmup_steps": 0}
    bad = trial("bad", **burst)
    results = measure([still, good, bad])
    assert [result["outcome"] for result in results] == ["no better", "trained", "not finite"]
    assert results[0]["held_out_loss"] >= results[0]["constant_loss"]
    assert results[1]["held_out_loss"] < results[1]["constant_loss"]
    with pytest.raises(DivergedError) as error:
        Trainer(trial("again", **burst).experiment, Recorder()).run()
    assert results[2]["not_finite_at"] == error.value.step > 1 and results[2]["held_out_loss"] is None


def test_stopped_and_resumed(trial: Any, children: type[Child], tmp_path: Path) -> None:
    """Three trials of 6 steps, stopped in the third step of b and then in its last one."""
    a, b, c = trials = [trial(name, seed=seed) for seed, name in enumerate("abc")]
    held_out, log = open_held_out(a.experiment, None, 32, 4), tmp_path / "out" / "trials-0.log"
    shown: list[tuple[int, int, str]] = []

    def run() -> list[dict[str, Any]]:
        return run_trials(trials, held_out, 1, lambda *progress: shown.append(progress))

    for held_step, results in ((9, [a]), (3, [a, b])):
        children.held_step = held_step
        threading.Thread(target=interrupt, args=(log.with_suffix(".gate"),), daemon=True).start()
        with pytest.raises(Stopped, match="the same command resumes"):
            run()
        assert [one for one in trials if finished(one)] == results and not (c.folder / "metrics.jsonl").exists()
    assert (6 + 2, 18, "b") in shown and "resuming from step 3" in log.read_text()
    children.held_step = None
    results = run()
    assert [result["trial"]["unit"] for result in results] == ["a", "b", "c"] and shown[-1] == (18, 18, "")
    assert log.read_text().count("/step-00000006") == 3, "each is trained once"
    (again,) = measure([trial("again", seed=1)])
    assert results[1]["held_out_loss"] == pytest.approx(again["held_out_loss"], rel=1e-5)


def interrupt(gate: Path) -> None:
    wait_for(gate.exists)
    os.kill(os.getpid(), signal.SIGINT)


def test_nothing_is_trained_beside_a_trial_of_randomness_1(trial: Any) -> None:
    a, b = trial("a"), trial("b")
    results = measure([a])
    assert results[0]["randomness"] == 2
    make_version_1(a.folder)
    assert check([a]) == [{key: value for key, value in results[0].items() if key != "randomness"}]
    for case in ("result", "checkpoint"):
        with pytest.raises(InputError, match=rf"{a.folder} was trained with randomness 1"):
            check([b, a])
        assert not b.folder.exists(), case
        (a.folder / "trial.json").unlink(missing_ok=True)


def test_refuses_another_trials_folder(trial: Any) -> None:
    measure([trial("a")])
    with pytest.raises(InputError, match=r"optimizer\.learning_rate: 0\.001 -> 0\.01"):
        check([trial("a", **{"optimizer.learning_rate": 0.01})])
    with pytest.raises(InputError, match=r"train\.max_steps: 6 -> 7"):
        check([trial("a", **{"train.max_steps": 7})])
    with pytest.raises(InputError, match="other --images, --times or --held-out"):
        check([trial("a")], num_times=5)
    result, config = (trial("a").folder / name for name in ("trial.json", "config.yaml"))
    result.write_text("{")
    with pytest.raises(InputError, match="truncated or corrupted"):
        check([trial("a")])
    result.unlink()
    recipe = config.read_text()
    with pytest.raises(InputError, match=r"another recipe \(optimizer\.learning_rate: 0\.001 -> 0\.01\)"):
        check([trial("a", **{"optimizer.learning_rate": 0.01})])
    assert config.read_text() == recipe


def test_placements_of_five_blocks() -> None:
    assert placements(5) == {
        "first-0": [],
        "first-1": [0],
        "first-2": [0, 1],
        "first-3": [0, 1, 2],
        "first-4": [0, 1, 2, 3],
        "first-5": [0, 1, 2, 3, 4],
        "without-in": [2, 3, 4],
        "without-mid": [0, 1, 3, 4],
        "without-out": [0, 1, 2],
    }
    assert placements(1) == {"first-0": [], "first-1": [0], "without-mid": []}


def test_equal_placements_are_trained_once_and_listed_under_both_names(recipe: str, tmp_path: Path) -> None:
    found = placement_trials(tmp_path, recipe, unit="se-individual", seeds=[4, 5], steps=2, keys={})
    models = [trial.experiment.model.model_dump() for trial in found]
    # For three blocks: the first 0, 1, 2 and 3; without in; without mid. Without out is the same as the first two.
    assert [m["attention_blocks"] for m in models] == 2 * [None, [0], [0, 1], [0, 1, 2], [1, 2], [0, 2]]
    assert [m["attention"] for m in models] == 2 * ["none", "se", "se", "se", "se", "se"]
    assert models[1]["attention_kwargs"] == {"sharing": "individual"}
    with pytest.raises(InputError, match=r"`model\.backbone` must be uvit for placements, got 'unet2d'"):
        placement_trials(tmp_path, "digits_unet_cpu", unit="se", seeds=[0], steps=2, keys={})
    results = [
        {"trial": trial.label, "outcome": "trained", "held_out_loss": len(trial.label["blocks"]) + 0.5 * seed}
        for trial, seed in zip(found, [0] * 6 + [1] * 6, strict=True)
    ]
    rows = {row["placement"]: row for row in summarize_placement(results, 3)}
    assert rows["without-out"]["held_out_loss"] == rows["first-2"]["held_out_loss"] == [2.0, 2.5]
    assert rows["first-2"]["held_out_loss_mean"] == 2.25
    assert rows["first-2"]["held_out_loss_half_width"] == pytest.approx(12.7062 * 0.25, rel=1e-5)  # t with 1 d.o.f.


def test_stability_variants_change_what_they_name(recipe: str, tmp_path: Path) -> None:
    found = stability_trials(
        tmp_path,
        recipe,
        variants=["as-is", "no-long-skips", "no-residuals", "no-layer-norm"],
        units=["none", "dia-lstm"],
        rates=[1e-3, 0.1],
        seeds=[0],
        batch_size=4,
        steps=2,
        keys={},
    )
    assert len({trial.folder for trial in found}) == len(found) == 16
    for trial in found:
        model, about = trial.experiment.model, trial.label
        missing = (not model.long_skips, not model.residual_skips, not model.layer_norm)
        names = ("no-long-skips", "no-residuals", "no-layer-norm")
        assert missing == tuple(about["variant"] == name for name in names)
        assert model.attention == about["unit"]
        assert trial.experiment.optimizer.learning_rate == about["learning_rate"]
        assert (trial.experiment.optimizer.warmup_steps, trial.experiment.optimizer.schedule) == (0, "constant")
        assert trial.experiment.train.batch_size == 4
    results = [
        {"trial": t.label, "outcome": outcome, "held_out_loss": loss, "not_finite_at": step}
        for t in found[:1]
        for outcome, loss, step in (("trained", 0.25, None), ("no better", 0.9, None), ("not finite", None, 7))
    ]
    (row,) = summarize_stability(results)
    assert row["held_out_loss"] == 0.25 and row["seeds"] == 3 and row["not_finite_at"] == [7]


def test_commands_write_figure_and_numbers(
    recipe: str, children: type[Child], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "analysis"
    common = ["--config", recipe, "--steps", "2", "--seeds", "0", "--images", "8", "--times", "2", "--out", str(out)]
    stability = ["analyze", "stability", "--units", "none", "--variants", "as-is", "--learning-rates", "1e-3,1e30"]
    assert main([*stability, *common, "--plan"]) == 0 and not out.exists()
    assert "2 trainings" in capsys.readouterr().out
    assert main([*stability, *common, "--jobs", "2"]) == 0
    assert main(["analyze", "placement", *common]) == 0
    for name, count in (("stability", 2), ("placement", 6)):
        record = json.loads((out / f"{name}.json").read_text())
        assert len(record["trials"]) == count and (out / f"{name}.png").stat().st_size > 10_000
    assert "not finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["stability", "--variants", "no-skips"],
            "each of `--variants` must be one of as-is, no-long-skips, ",
        ),
        (
            ["stability", "--units", "none,sea", "--variants", "as-is", "--seeds", "0"],
            "attention unit must be none or one of",
        ),
        (["stability", "--learning-rates", "1e-3,fast"], "each of `--learning-rates` must be a number, got 'fast'"),
        (["stability", "--seeds", "0.5"], "each of `--seeds` must be a whole number, got '0.5'"),
        (["placement", "--steps", "0"], "`--steps` must be 1 or more, got 0"),
        (["placement", "--unit", "dia-lstm-individual"], "sharing"),
        (["placement", "--protocol", "fd-digit"], "got 'fd-digit'"),
        (["placement", "--config", "cifar10_uvit_cp"], "got 'cifar10_uvit_cp'"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "analysis"
    assert main(["analyze", *arguments, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()
