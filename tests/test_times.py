"""Distributions of times, compared with scipy's quantiles and the definitions."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from dia_diffusion.errors import InputError
from dia_diffusion.noise import PROCESSES, NoiseProcess
from dia_diffusion.training.randomness import uniforms

UNIFORM = uniforms(0, 0, 0, 500, 1)[:, 0]
ENDS = torch.tensor([0.0, 1 - 2**-24])  # smallest and largest draws


def process_with(schedule: str, **times: object) -> NoiseProcess:
    return NoiseProcess(schedule, "sample", **times)


@pytest.mark.parametrize("schedule", PROCESSES)
def test_uniform_is_the_draws_themselves(schedule: str) -> None:
    process = process_with(schedule)
    assert torch.equal(process.timestep(UNIFORM), process.process.network_time(UNIFORM))


def test_logit_normal() -> None:
    t = process_with("flow", times="logit-normal", times_kwargs={"mean": -0.5, "deviation": 1.3}).timestep(UNIFORM)
    logit = -0.5 + 1.3 * norm.ppf(UNIFORM.double().numpy())
    np.testing.assert_allclose(t / 1000, 1 / (1 + np.exp(-logit)), rtol=1e-4)


@pytest.mark.parametrize(("schedule", "tolerance"), [("flow", 1e-3), ("vp-continuous", 1e-3), ("cosine", 0.2)])
def test_log_normal_is_edms(schedule: str, tolerance: float) -> None:
    """sigma / alpha at the drawn times; a discrete process has a nearby ratio."""
    process = process_with(schedule, times="log-normal")
    alpha, sigma = process.process.alpha_sigma(process.timestep(UNIFORM))
    expected = -1.2 + 1.2 * norm.ppf(UNIFORM.double().numpy())
    shown = (expected > -4) & (expected < 2)
    np.testing.assert_allclose((sigma / alpha).log()[shown], expected[shown], rtol=0, atol=tolerance)


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_shift_on_the_flow(shift: float) -> None:
    t = process_with("flow", shift=shift).timestep(UNIFORM) / 1000
    torch.testing.assert_close(t, shift * UNIFORM / (1 + (shift - 1) * UNIFORM), rtol=0, atol=1e-6)


@pytest.mark.parametrize("times", ["uniform", "logit-normal", "log-normal"])
def test_shift_multiplies_sigma_over_alpha(times: str) -> None:
    ratios = []
    for shift in (1.0, 2.0):
        process = process_with("vp-continuous", times=times, shift=shift)
        alpha, sigma = process.process.alpha_sigma(process.timestep(UNIFORM))
        ratios.append(sigma / alpha)
    inside = (ratios[0] > 0.02) & (ratios[1] < 50)
    torch.testing.assert_close(ratios[1][inside], 2 * ratios[0][inside], rtol=1e-3, atol=0)


@pytest.mark.parametrize("schedule", PROCESSES)
@pytest.mark.parametrize("times", ["uniform", "logit-normal", "log-normal"])
@pytest.mark.parametrize("shift", [0.01, 1.0, 100.0])
def test_all_draws_give_times_of_the_process(schedule: str, times: str, shift: float) -> None:
    arguments = {} if times == "uniform" else {"deviation": 50.0}
    process = process_with(schedule, times=times, times_kwargs=arguments, shift=shift)
    timestep = process.timestep(ENDS)
    last = float(process.process.network_time(torch.tensor(1 - 2**-24)))
    assert timestep.dtype == process.process.network_time(ENDS).dtype
    assert 0 <= timestep[0] <= timestep[1] <= last
    assert process.loss_weight(timestep).isfinite().all()
    assert all(part.isfinite().all() for part in process.mix(torch.ones(2, 1, 1, 1), torch.ones(2, 1, 1, 1), timestep))


@pytest.mark.parametrize(
    ("times", "arguments", "message"),
    [
        ("uniform", {"mean": 0}, r"`noise.times_kwargs` must be empty for noise.times uniform, got 'mean'"),
        ("logit-normal", {"std": 1}, r"must have no keys but mean, deviation for noise.times logit-normal, got 'std'"),
        ("log-normal", {"process": 1}, r"must have no keys but mean, deviation for noise.times log-normal, got"),
        ("logit-normal", {"deviation": 0}, r"`noise.times_kwargs.deviation` must be above 0, got 0"),
        ("log-normal", {"mean": "low"}, r"`noise.times_kwargs.mean` must be a finite number, got 'low'"),
    ],
)
def test_arguments_that_no_distribution_has(times: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        process_with("flow", times=times, times_kwargs=arguments)
