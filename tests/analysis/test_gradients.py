"""Sizes of gradients against numpy on given values, and against autograd by hand on a run's blocks."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dia_diffusion.analysis.gradients import Magnitudes, gradients_of_run
from dia_diffusion.analysis.run import open_runs
from dia_diffusion.analysis.stages import uvit_blocks
from dia_diffusion.cli.main import main
from dia_diffusion.training.diffusion import diffusion_loss


def test_the_distribution_is_that_of_the_elements() -> None:
    values = np.random.default_rng(0).normal(size=5000) * np.geomspace(1e-9, 1e3, 5000)
    magnitudes = Magnitudes()
    for part in np.split(values, 5):
        magnitudes.add(torch.from_numpy(part).reshape(10, -1))
    magnitudes.add(torch.tensor([0.0, 0.0, float("nan"), float("inf")]))
    record, size = magnitudes.summary(), np.abs(values)
    assert (record["elements"], record["zeros"], record["not_finite"]) == (5002, 2, 2)
    assert record["mean"] == pytest.approx(size.sum() / 5002)
    assert record["deviation"] == pytest.approx(np.append(size, [0, 0]).std())
    for quantile, value in record["quantiles"].items():
        assert value == pytest.approx(np.quantile(size, float(quantile)), rel=0.03)
    assert sum(record["histogram"]["counts"]) == 5000
    assert record["histogram"]["lowest"] == pytest.approx(np.floor(20 * np.log10(size.min())) / 20)


def test_no_gradient_has_no_quantiles() -> None:
    magnitudes = Magnitudes()
    magnitudes.add(torch.zeros(3))
    assert magnitudes.summary()["mean"] == 0 and magnitudes.summary()["quantiles"] is None


def test_a_runs_gradients_are_those_of_its_loss_at_the_blocks(tiny_run: Callable[[str], Path]) -> None:
    (run,) = open_runs([tiny_run("dia-lstm")])
    record = gradients_of_run(run, [0, 6], num_batches=2, batch_size=4, weights="raw", seed=5)
    assert [step["step"] for step in record["steps"]] == [0, 6] and record["measured_batch_size"] == 4
    for step, model in zip(record["steps"], (run.first_model(), run.model(6, "raw")), strict=True):
        model.requires_grad_(True)
        sizes: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}
        for number in range(2):
            draws = run.draw(5, number, 4)
            outputs: list[torch.Tensor] = []
            hooks = [
                b.register_forward_hook(lambda *given, kept=outputs: kept.append(given[2][0]))
                for b in uvit_blocks(model)
            ]
            images, labels = run.batch(draws)
            loss = diffusion_loss(model, run.process, images, draws, labels)
            for block, gradient in enumerate(torch.autograd.grad(loss, outputs)):
                sizes[block].append(gradient.abs().double().numpy().ravel())
            for hook in hooks:
                hook.remove()
        for block, name in enumerate(("in 1", "mid", "out 1")):
            measured, expected = step["blocks"][block], np.concatenate(sizes[block])
            assert measured["block"] == name and measured["elements"] == len(expected) == 2 * 4 * 5 * 16
            assert measured["mean"] == pytest.approx(expected.mean(), rel=1e-5)
            assert measured["deviation"] == pytest.approx(expected.std(), rel=1e-5)
            middle = np.median(expected[expected > 0])
            assert measured["quantiles"]["0.5"] == pytest.approx(middle, rel=0.05)
    last = record["steps"][1]["blocks"][2]
    assert last["ends_stage"] and last["zeros"] == 2 * 4 * 16  # the time token, which the decoder leaves out


def test_the_command_writes_a_figure_and_numbers(tiny_run: Callable[[str], Path], tmp_path: Path) -> None:
    runs = [str(tiny_run(name)) for name in ("dia-lstm", "none")]
    assert main(["analyze", "gradients", *runs, "--out", str(tmp_path), "--batches", "2", "--steps", "0,6"]) == 0
    record = json.loads((tmp_path / "gradients.json").read_text())
    assert record["protocol"] == {"batches": 2, "weights": "ema", "seed": 0, "randomness": 2}
    assert len(record["runs"]) == 2
    assert [len(step["blocks"]) for step in record["runs"][1]["steps"]] == [3, 3]
    assert Image.open(tmp_path / "gradients.png").size[0] > 500
