"""Gradient noise against gradients whose mean and covariance are known, and against plain numpy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dia_diffusion import UViT
from dia_diffusion.analysis.gradient_noise import gradient_noise, group_of, logged_norms, noise_of_run
from dia_diffusion.analysis.run import open_runs
from dia_diffusion.cli.main import main
from dia_diffusion.errors import InputError
from dia_diffusion.training.diffusion import diffusion_loss


class Line(nn.Module):
    """A loss whose gradient is the mean of what it is given."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))


def noise_of(gradients: np.ndarray, batch_size: int) -> dict:
    """The record of batches (K, P) of given gradients."""
    line = Line(gradients.shape[1])
    given = [torch.from_numpy(gradient) for gradient in gradients]
    return gradient_noise(line, [lambda g=g: line.weight @ g for g in given], batch_size)["all"]


def test_estimates_are_those_of_numpy() -> None:
    gradients = np.random.default_rng(0).normal(0.3, 1.0, size=(13, 7))
    record = noise_of(gradients, 4)
    spread = gradients.var(axis=0, ddof=1).sum()
    pairs = gradients @ gradients.T
    squared = (pairs.sum() - np.trace(pairs)) / (13 * 12)  # the mean product of two different batches' gradients
    assert record["covariance_trace"] == pytest.approx(4 * spread)
    assert record["squared_gradient_norm"] == pytest.approx(squared)
    assert record["noise_scale"] == pytest.approx(4 * spread / squared)
    assert record["batch_gradient_norm"] == pytest.approx(np.sqrt(np.square(gradients).sum(axis=1).mean()))


def test_the_noise_scale_of_a_known_distribution_lies_in_its_range() -> None:
    """One image's gradient has mean 0.1 and covariance 4 I in 50 dimensions: tr 200, |G|^2 0.5."""
    draw = np.random.default_rng(1)
    inside, estimates = 0, []
    for _ in range(40):
        record = noise_of(0.1 + draw.normal(0, 2 / np.sqrt(16), size=(200, 50)), 16)
        estimates.append((record["covariance_trace"], record["squared_gradient_norm"]))
        high = record["noise_scale_high"] or np.inf
        inside += record["noise_scale_low"] < 400 < high
    assert np.mean(estimates, axis=0) == pytest.approx([200, 0.5], rel=0.05)
    assert inside >= 33  # two standard errors, themselves from 8 parts


def test_no_gradient_has_no_noise_scale() -> None:
    gradients = np.repeat(np.eye(4), 4, axis=0) * np.tile([1, 1, -1, -1], 4)[:, None]
    record = noise_of(gradients, 1)
    assert record["noise_scale"] is None and record["noise_scale_high"] is None


def test_groups_are_the_parts_of_the_network() -> None:
    model = UViT(sample_size=8, patch_size=2, hidden_size=32, num_layers=3, num_attention_heads=4)
    sizes = dict.fromkeys(("unit", "MLPs", "attention", "norms", "others"), 0)
    for name, parameter in model.named_parameters():
        sizes[group_of(name)] += parameter.numel()
    blocks = (*model.in_blocks, model.mid_block, *model.out_blocks)

    def count(modules: list[nn.Module]) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    assert sizes["unit"] == count([model.unit]) and sizes["MLPs"] == count([block.mlp for block in blocks])
    assert sizes["attention"] == count([block.attn for block in blocks])
    assert sizes["norms"] == 7 * 2 * 32
    assert sum(sizes.values()) == count([model])


def test_a_runs_noise_is_that_of_its_own_loss(tiny_run: Callable[[str], Path]) -> None:
    (run,) = open_runs([tiny_run("dia-lstm")])
    record = noise_of_run(run, [6], num_batches=3, batch_size=4, seed=5)
    model = run.model(6).requires_grad_(True)
    gradients = []
    for number in range(3):
        draws = run.draw(5, number, 4)
        images, labels = run.batch(draws)
        loss = diffusion_loss(model, run.process, images, draws, labels)
        parts = torch.autograd.grad(loss, [*model.mid_block.mlp.parameters()])
        gradients.append(torch.cat([part.flatten() for part in parts]).double().numpy())
    alone = noise_of(np.array(gradients), 4)
    groups = record["steps"][0]["groups"]
    assert groups["MLPs"]["parameters"] == 3 * (16 * 64 + 64 + 64 * 16 + 16)
    assert 0 < alone["covariance_trace"] < groups["MLPs"]["covariance_trace"] < groups["all"]["covariance_trace"]
    own = [value["covariance_trace"] for name, value in groups.items() if name != "all"]
    assert sum(own) == pytest.approx(groups["all"]["covariance_trace"])
    # The middle block and the two others make up the group.
    rest = [block.mlp for block in (*model.in_blocks, *model.out_blocks)]
    for mlp in rest:
        gradients = []
        for number in range(3):
            draws = run.draw(5, number, 4)
            images, labels = run.batch(draws)
            loss = diffusion_loss(model, run.process, images, draws, labels)
            parts = torch.autograd.grad(loss, [*mlp.parameters()])
            gradients.append(torch.cat([part.flatten() for part in parts]).double().numpy())
        alone["covariance_trace"] += noise_of(np.array(gradients), 4)["covariance_trace"]
    assert groups["MLPs"]["covariance_trace"] == pytest.approx(alone["covariance_trace"], rel=1e-4)


def test_raw_weights_are_those_of_the_checkpoint(tiny_run: Callable[[str], Path]) -> None:
    (run,) = open_runs([tiny_run("block-channels")])
    averaged, raw = run.model(6).state_dict(), run.model(6, "raw").state_dict()
    assert averaged.keys() == raw.keys() and not torch.equal(averaged["unit.scale"], raw["unit.scale"])
    with pytest.raises(InputError, match="no checkpoint of step 4; accepted: 3, 6"):
        run.model(4, "raw")


def test_raw_weights_are_looked_for_among_checkpoints(tiny_run: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_run("block-channels"), tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "step-00000003")
    shutil.rmtree(folder / "pipelines" / "step-00000006")
    (run,) = open_runs([folder])
    assert [run.choose_steps(None), run.choose_steps(None, "raw")] == [[3], [6]]
    assert [step["step"] for step in noise_of_run(run, num_batches=2, weights="raw")["steps"]] == [6]
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(InputError, match="has no checkpoints"):
        run.choose_steps(None, "raw")


def test_logged_norms_by_window() -> None:
    lines = [{"step": step, "loss": 1.0, "grad_norm": float(step)} for step in range(1, 9)]
    lines.insert(3, {"step": 4, "loss": 1.0, "grad_norm": None})  # as fp16's scaler leaves it
    first, last = logged_norms(lines, 2)
    assert (first["first_step"], first["last_step"], last["last_step"]) == (1, 4, 8)
    assert first["mean"] == 2.5 and first["variation"] == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2.5)
    assert logged_norms([], 3) == []


def test_the_commands_write_figures_and_numbers(tiny_run: Callable[[str], Path], tmp_path: Path) -> None:
    few = ["--out", str(tmp_path / "out"), "--seed", "1"]
    runs = [str(tiny_run("dia-lstm")), str(tiny_run("block-channels"))]
    assert main(["analyze", "maps", *runs, *few, "--images", "3", "--times", "2"]) == 0
    assert main(["analyze", "gradient-noise", *runs, str(tiny_run("none")), *few, "--batches", "3"]) == 0
    assert main(["analyze", "gradient-noise", runs[0], *few, "--batches", "2", "--weights", "raw", "--steps", "6"]) == 0
    for name, count in (("maps", 2), ("gradient-noise", 1)):
        record = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert record["analysis"] == name and len(record["runs"]) == count and record["protocol"]["seed"] == 1
        assert Image.open(tmp_path / "out" / f"{name}.png").size[0] > 500
    assert main(["analyze", "maps", str(tiny_run("none")), *few]) == 2
    assert main(["analyze", "gradient-noise", runs[0], *few, "--weights", "raw", "--steps", "3"]) == 0
