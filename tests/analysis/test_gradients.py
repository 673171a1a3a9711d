"""Sizes and noise of gradients against values with known statistics and against explicit autograd calls."""

import numpy as np
import pytest
import torch
from torch import nn

from dia_diffusion.analysis.gradient_noise import ANALYSIS as GRADIENT_NOISE
from dia_diffusion.analysis.gradient_noise import gradient_noise, logged_norms
from dia_diffusion.analysis.gradients import ANALYSIS as GRADIENTS
from dia_diffusion.analysis.gradients import Magnitudes
from dia_diffusion.analysis.run import GradientBatches, open_runs
from dia_diffusion.analysis.stages import uvit_blocks
from dia_diffusion.training.diffusion import image_losses
from tests.analysis.conftest import MakeRun


def test_the_distribution_of_the_elements_matches_numpy() -> None:
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
    nothing = Magnitudes()
    nothing.add(torch.zeros(3))
    assert nothing.summary()["mean"] == 0 and nothing.summary()["quantiles"] is None


def test_run_gradients_match_autograd_at_the_blocks(tiny_run: MakeRun) -> None:
    (run,) = open_runs([tiny_run("dia-lstm")])
    record = GRADIENTS.of_run(run, [0, 6], GradientBatches(2, 4, seed=5), "raw")
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
            loss = image_losses(model, run.process, images, draws, labels).mean()
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
    assert last["ends_stage"] and last["zeros"] == 2 * 4 * 16  # the time token, which the decoder drops


class Line(nn.Module):
    """A weight vector for losses that are linear in it, so that their gradients can be chosen."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))


def noise_of(gradients: np.ndarray, batch_size: int) -> dict:
    """The record for given gradients (K, P), one per batch."""
    line = Line(gradients.shape[1])
    given = [torch.from_numpy(gradient) for gradient in gradients]
    return gradient_noise(line, [lambda g=g: line.weight @ g for g in given], batch_size)["all"]


def test_estimates_match_numpy() -> None:
    gradients = np.random.default_rng(0).normal(0.3, 1.0, size=(13, 7))
    record = noise_of(gradients, 4)
    spread = gradients.var(axis=0, ddof=1).sum()
    pairs = gradients @ gradients.T
    squared = (pairs.sum() - np.trace(pairs)) / (13 * 12)  # the mean product of two different batches' gradients
    assert record["covariance_trace"] == pytest.approx(4 * spread)
    assert record["squared_gradient_norm"] == pytest.approx(squared)
    assert record["noise_scale"] == pytest.approx(4 * spread / squared)
    assert record["batch_gradient_norm"] == pytest.approx(np.sqrt(np.square(gradients).sum(axis=1).mean()))


def test_the_interval_holds_the_noise_scale_of_a_known_distribution() -> None:
    """One image's gradient has mean 0.1 and covariance 4 I in 50 dimensions: trace 200, |G|^2 0.5."""
    draw = np.random.default_rng(1)
    inside, estimates = 0, []
    for _ in range(40):
        record = noise_of(0.1 + draw.normal(0, 2 / np.sqrt(16), size=(200, 50)), 16)
        estimates.append((record["covariance_trace"], record["squared_gradient_norm"]))
        high = record["noise_scale_high"] or np.inf
        inside += record["noise_scale_low"] < 400 < high
    assert np.mean(estimates, axis=0) == pytest.approx([200, 0.5], rel=0.05)
    assert inside >= 33  # two standard errors, estimated from 8 parts
    nothing = noise_of(np.repeat(np.eye(4), 4, axis=0) * np.tile([1, 1, -1, -1], 4)[:, None], 1)
    assert nothing["noise_scale"] is None and nothing["noise_scale_high"] is None
    two = noise_of(0.1 + draw.normal(0, 2 / np.sqrt(16), size=(2, 50)), 16)
    assert two["standard_error"] is None and two["noise_scale_low"] is None and two["noise_scale_high"] is None


def test_run_gradient_noise_matches_autograd(tiny_run: MakeRun) -> None:
    (run,) = open_runs([tiny_run("dia-lstm")])
    record = GRADIENT_NOISE.of_run(run, [6], GradientBatches(3, 4, seed=5))
    groups = record["steps"][0]["groups"]
    model = run.model(6).requires_grad_(True)
    parts = {"unit": [model.unit], "attention": [block.attn for block in uvit_blocks(model)]}
    sizes = {
        name: sum(parameter.numel() for module in modules for parameter in module.parameters())
        for name, modules in parts.items()
    }
    sizes |= {"MLPs": 3 * (16 * 64 + 64 + 64 * 16 + 16), "norms": 7 * 2 * 16}
    assert {name: groups[name]["parameters"] for name in sizes} == sizes
    own = [value["covariance_trace"] for name, value in groups.items() if name != "all"]
    assert min(own) > 0 and sum(own) == pytest.approx(groups["all"]["covariance_trace"])
    mlps = [parameter for block in uvit_blocks(model) for parameter in block.mlp.parameters()]
    gradients = []
    for number in range(3):
        draws = run.draw(5, number, 4)
        images, labels = run.batch(draws)
        parts = torch.autograd.grad(image_losses(model, run.process, images, draws, labels).mean(), mlps)
        gradients.append(torch.cat([part.flatten() for part in parts]).double().numpy())
    expected = noise_of(np.array(gradients), 4)["covariance_trace"]
    assert groups["MLPs"]["covariance_trace"] == pytest.approx(expected, rel=1e-4)


def test_logged_norms_by_window() -> None:
    lines = [{"step": step, "loss": 1.0, "grad_norm": float(step)} for step in range(1, 9)]
    lines.insert(3, {"step": 4, "loss": 1.0, "grad_norm": None})  # as fp16's scaler leaves it
    first, last = logged_norms(lines, 2)
    assert (first["first_step"], first["last_step"], last["last_step"]) == (1, 4, 8)
    assert first["mean"] == 2.5 and first["variation"] == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2.5)
    assert logged_norms([], 3) == []
