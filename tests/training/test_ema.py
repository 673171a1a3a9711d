"""Power-function averages against closed forms and brute force, and reconstructed ones against direct averages."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from dia_diffusion.errors import InputError
from dia_diffusion.io import step_folders
from dia_diffusion.training.checkpoint import check_checkpoint
from dia_diffusion.training.config import MAX_POWER_WIDTH
from dia_diffusion.training.ema import PowerEMA, gamma_of, inner_products, reconstruction
from dia_diffusion.training.snapshots import Snapshots
from dia_diffusion.training.trainer import Trainer
from tests.training.conftest import Recorder
from tests.training.run_files import assert_same_run, cut_off, weights
from tests.training.test_finite import spoil

KEPT, SKIPPED = torch.tensor(False), torch.tensor(True)
AVERAGES = ("--ema.power_widths", "[0.05, 0.1]", "--ema.snapshot_every", "2", "--ema.further_decays", "[0.5, 0.99]")


# ---- Widths and profiles


def width_of(gamma: float) -> float:
    """The standard deviation of a profile tau^gamma on 0..1."""
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


def test_widths_and_exponents() -> None:
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005) and gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    for width in (0.001, 0.02, 0.1, 0.25, MAX_POWER_WIDTH):
        gamma = gamma_of(width)
        assert gamma >= 0 and width_of(gamma) == pytest.approx(width, rel=1e-12)


@pytest.mark.parametrize("width", [0.02, 0.1, 0.25])
def test_the_width_is_the_standard_deviation_of_the_profile(width: float) -> None:
    gamma = gamma_of(width)
    times = (np.arange(100_000) + 0.5) / 100_000
    profile = (gamma + 1) * times**gamma
    mean = (profile * times).mean()
    assert (profile * (times - mean) ** 2).mean() ** 0.5 == pytest.approx(width, rel=1e-5)


def test_inner_products_are_integrals() -> None:
    def profile(step: float, gamma: float) -> np.ndarray:
        return np.where(times <= step, (gamma + 1) * times**gamma / step ** (gamma + 1), 0)

    times = (np.arange(200_000) + 0.5) / 200_000 * 10
    for pair in (((10, 3), (10, 7)), ((4, 3), (10, 7)), ((10, 3), (4, 7)), ((5, 0), (5, 0))):
        product = float(np.prod([profile(step, gamma) for step, gamma in pair], axis=0).mean() * 10)
        (a, b), (c, d) = (map(np.array, one) for one in pair)
        assert float(inner_products(a, b, c, d)) == pytest.approx(product, rel=1e-4)


# ---- PowerEMA


def test_the_average_of_weights_that_move_linearly(in_float64: None) -> None:
    """gamma 1, weights k after step k: the sum of k (k^2 - (k - 1)^2) / t^2 is (t + 1) (4 t - 1) / (6 t)."""
    average = PowerEMA([torch.ones(1)], width_of(1))
    for step in range(1, 101):
        average.update([torch.tensor([float(step)])], KEPT)
        assert average.parameters[0].item() == pytest.approx((step + 1) * (4 * step - 1) / (6 * step), rel=1e-12)


@pytest.mark.parametrize("width", [0.01, 0.1, 0.28])
def test_each_step_counts_by_the_integral_of_the_profile(width: float, in_float64: None) -> None:
    weights = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    average = PowerEMA([torch.full((3,), 9.0)], width)
    for index, own in enumerate(weights):
        average.update([own], SKIPPED if index in (0, 7) else KEPT)  # a skipped step counts with its unchanged weights
    edges = np.linspace(0, 1, 51) ** (gamma_of(width) + 1)
    assert average.parameters[0].numpy() == pytest.approx(np.diff(edges) @ weights.numpy(), rel=1e-10)


# ---- Reconstruction


def random_walk(steps: int) -> np.ndarray:
    """(steps, 200): weights that start at 1 and move by a normal number per step."""
    return 1 + np.random.default_rng(0).normal(size=(steps, 200)).cumsum(axis=0) / steps**0.5


def averaged(walk: np.ndarray, step: int, width: float) -> np.ndarray:
    """The power-function average after a step, computed from its profile."""
    return np.diff(np.linspace(0, 1, step + 1) ** (gamma_of(width) + 1)) @ walk[:step]


@pytest.mark.parametrize("width", [0.02, 0.05, 0.07, 0.15, 0.25])
def test_an_average_of_any_width_is_a_sum_of_snapshots(width: float) -> None:
    walk = random_walk(1200)
    kept = [(step, tracked) for step in range(20, 1201, 20) for tracked in (0.05, 0.1)]
    steps, gammas = np.array([step for step, _ in kept], float), np.array([gamma_of(tracked) for _, tracked in kept])
    weights, residuals = reconstruction(steps, gammas, 1200, np.array([gamma_of(width)]))
    assert weights.sum() == pytest.approx(1, abs=1e-9)
    found = weights[:, 0] @ np.array([averaged(walk, *each) for each in kept])
    error = np.abs(found - averaged(walk, 1200, width)).max()
    assert residuals[0] < 0.02 and error < 5e-3, (residuals, error)  # for a walk with standard deviation 1
    if width == 0.05:
        assert residuals[0] < 1e-6 and weights[-2, 0] == pytest.approx(1)


def test_a_direct_fit_agrees() -> None:
    """Least squares with torch, over the profiles' integrals in 1,000 parts of training."""
    parts = 1000
    kept = [(step, tracked) for step in range(100, 1001, 100) for tracked in (0.05, 0.1)]

    def profile(step: int, width: float) -> torch.Tensor:
        values = np.diff(np.linspace(0, parts / step, parts + 1).clip(0, 1) ** (gamma_of(width) + 1))
        return torch.from_numpy(values)

    rows = torch.stack([profile(*each) for each in kept], dim=1)  # (parts, averages)
    wanted = profile(1000, 0.07)
    basis = rows[:, :-1] - rows[:, -1:]  # weights sum to 1
    fitted = torch.linalg.lstsq(basis, (wanted - rows[:, -1])[:, None], driver="gelsd").solution[:, 0]
    best = (basis @ fitted + rows[:, -1] - wanted).norm() / wanted.norm()
    steps, gammas = (np.array(each, float) for each in zip(*((s, gamma_of(w)) for s, w in kept), strict=True))
    weights, residuals = reconstruction(steps, gammas, 1000, np.array([gamma_of(0.07)]))
    own = (rows @ torch.from_numpy(weights[:, 0]) - wanted).norm() / wanted.norm()
    assert float(own) == pytest.approx(float(best), rel=0.01)
    assert residuals[0] == pytest.approx(float(best), rel=0.01)


# ---- Runs


def test_the_average_of_a_width_is_that_of_the_history(tiny, tmp_path: Path) -> None:
    """Compares reconstruction from a run's snapshots with the direct average of the weights after each step."""
    steps = ("--train.max_steps", "60", "--train.checkpoint_every", "60", "--optimizer.learning_rate", "1e-2")
    history: list[np.ndarray] = []
    averages = ("--ema.power_widths", "[0.05, 0.1]", "--ema.snapshot_every", "2")
    trainer = Trainer(tiny("run", *steps, *averages), Recorder(lambda step: history.append(flat(trainer.parameters))))
    trainer.run()
    final = dict(zip(trainer.names, trainer.parameters, strict=True))
    for width, bound in ((0.02, 0.01), (0.07, 1e-4), (0.25, 0.015)):
        average = Snapshots(tmp_path / "run").average(width, final)
        made = flat(average[name] for name in trainer.names)
        kept = averaged(np.stack(history), 60, width)
        error, distance = np.linalg.norm(made - kept), np.linalg.norm(history[-1] - kept)
        assert error < bound * distance, (width, error / distance)


def flat(tensors: Iterable[torch.Tensor]) -> np.ndarray:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).double().numpy()


def test_a_run_with_averages_resumes_bit_for_bit(tiny, train, finished) -> None:
    whole, cut = finished("whole", *AVERAGES), cut_off(finished("cut", *AVERAGES))
    assert list(step_folders(whole / "snapshots")) == [2, 4, 6]
    altered = cut / "snapshots" / "step-00000004" / "width-0.1.safetensors"
    altered.write_bytes(b"")  # later than the checkpoint, so it is written again
    train(tiny("cut", *AVERAGES))
    assert_same_run(cut, whole)
    for file in (whole / "snapshots").rglob("*.safetensors"):
        assert (cut / file.relative_to(whole)).read_bytes() == file.read_bytes()
    assert torch.equal(*(weights(run, 6)["pos_embed"] for run in (finished("plain"), whole)))


def test_a_skipped_step_counts_with_its_unchanged_weights(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {3, 4}, lambda loss: loss * float("nan"))
    history: list[torch.Tensor] = []
    trainer = Trainer(tiny("run", *AVERAGES), Recorder(lambda step: history.append(trainer.parameters[0].clone())))
    trainer.run()
    assert torch.equal(history[1], history[3]) and not torch.equal(history[3], history[4])
    edges = np.linspace(0, 1, 7) ** (gamma_of(0.1) + 1)
    expected = sum(float(part) * own.double() for part, own in zip(np.diff(edges), history, strict=True))
    torch.testing.assert_close(trainer.averages["width-0.1"].parameters[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_further_decays_are_emas(finished) -> None:
    several = weights(finished("several", *AVERAGES), 6, "averages")
    alone = weights(finished("alone", "--ema.decay", "0.99"), 6, "ema")
    assert all(torch.equal(several[f"decay-0.99/{name}"], tensor) for name, tensor in alone.items())


def test_damaged_averages_of_a_checkpoint_are_found(tiny, train, finished) -> None:
    newest = finished("run", *AVERAGES) / "checkpoints" / "step-00000006"
    content = bytearray((newest / "averages.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "averages.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"averages\.safetensors is truncated or corrupted"):
        check_checkpoint(newest)
    train(tiny("run", *AVERAGES))
    assert newest.with_name("step-00000006.damaged").is_dir()
    assert_same_run(newest.parents[1], finished("whole", *AVERAGES))


def test_a_new_run_drops_the_snapshots_of_one_killed_before_its_checkpoint(tiny, train, finished) -> None:
    run = cut_off(finished("run", *AVERAGES), 0)
    shutil.rmtree(run / "pipelines")
    train(tiny("run", *AVERAGES, "--ema.snapshot_every", "3", "--train.max_steps", "3"))
    assert list(step_folders(run / "snapshots")) == [3]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--ema.power_widths [0.1]", "`ema.snapshot_every` must be 1 or more with `ema.power_widths`, got 0"),
        ("--ema.snapshot_every 5", "^`ema.snapshot_every` must be 0 without `ema.power_widths`, got 5"),
        ("--ema.power_widths [0.1,0.1] --ema.snapshot_every 5", "`ema.power_widths` must be different numbers"),
        ("--ema.power_widths [0.5] --ema.snapshot_every 2", r"`ema\.power_widths` must be 0\.288 or less, got 0\.5"),
        ("--ema.further_decays [0.9,0.9]", "`ema.further_decays` must be different numbers"),
    ],
)
def test_recipes_that_are_refused(options: str, line: str, tiny) -> None:
    with pytest.raises(InputError, match=line):
        tiny("run", *options.split())
