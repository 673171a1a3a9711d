"""The noise process against numerical integration, diffusers' schedulers and the definitions."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from dia_diffusion.errors import InputError
from dia_diffusion.noise import PREDICTION_TYPES, PROCESSES, NoiseProcess


def test_vp_is_the_integral_of_beta() -> None:
    process = PROCESSES["vp-continuous"]
    for t in (0.001, 0.1, 0.5, 1.0):
        grid = np.linspace(0, t, 20001)
        integral = np.trapezoid(0.1 + grid * 19.9, grid)
        alpha, sigma = process.alpha_sigma(torch.tensor([999 * t], dtype=torch.float64))
        assert float(alpha) == pytest.approx(np.exp(-integral / 2), rel=1e-9)
        assert float(alpha) ** 2 + float(sigma) ** 2 == pytest.approx(1)


def test_betas_give_the_same_process_at_whole_times() -> None:
    process = NoiseProcess("vp-continuous")
    scheduler = DDPMScheduler(**process.scheduler_config())
    alpha, sigma = process.process.alpha_sigma(torch.arange(1, 1000))
    table = scheduler.alphas_cumprod[1:].double()
    half_log_snr = 0.5 * (table.log() - torch.log1p(-table))
    assert (half_log_snr - (alpha / sigma).log()).abs().max() < 2e-3


@pytest.mark.parametrize(("ours", "theirs"), [("ddpm-linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_discrete_schedules_are_diffusers(ours: str, theirs: str) -> None:
    scheduler = DDPMScheduler(1000, beta_schedule=theirs)
    process = NoiseProcess(ours)
    timestep = torch.arange(1000)
    x, noise = torch.randn(1000, 1, 2, 2), torch.randn(1000, 1, 2, 2)
    mixed, _ = process.mix(x, noise, timestep)
    assert torch.allclose(mixed, scheduler.add_noise(x, noise, timestep), atol=1e-4)
    velocity = NoiseProcess(ours, "v_prediction").mix(x, noise, timestep)[1]
    assert torch.allclose(velocity, scheduler.get_velocity(x, noise, timestep), atol=1e-4)


def test_timesteps_cover_what_the_network_sees() -> None:
    uniform = torch.tensor([0.0, 0.5, 0.999999])
    assert NoiseProcess("vp-continuous").timestep(uniform).tolist() == pytest.approx([0, 499.5, 999], abs=1e-2)
    assert NoiseProcess("cosine").timestep(uniform).tolist() == [0, 500, 999]


@pytest.mark.parametrize("schedule", ["vp-continuous", "ddpm-linear"])
def test_min_snr_weighs_all_predictions_alike(schedule: str) -> None:
    """The weighted loss of a wrong x_0 is the same whichever quantity the network predicts."""
    timestep = torch.tensor([10, 200, 900])
    x, noise = torch.randn(3, 1, 4, 4).double(), torch.randn(3, 1, 4, 4).double()
    wrong_x = x + 0.1 * torch.randn(3, 1, 4, 4).double()
    losses = []
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        process = NoiseProcess(schedule, prediction_type, "min-snr")
        alpha, sigma = (f[:, None, None, None] for f in PROCESSES[schedule].alpha_sigma(timestep))
        noisy, target = process.mix(x, noise, timestep)
        wrong_noise = (noisy - alpha * wrong_x) / sigma
        prediction = {
            "epsilon": wrong_noise,
            "sample": wrong_x,
            "v_prediction": alpha * wrong_noise - sigma * wrong_x,
        }[prediction_type]
        losses.append((prediction - target).square().mean((1, 2, 3)) * process.loss_weight(timestep))
        snr = (alpha / sigma).square().flatten()
        assert torch.allclose(losses[-1], snr.clamp(max=5) * (wrong_x - x).square().mean((1, 2, 3)), rtol=1e-4)


def test_weights_at_the_ends() -> None:
    """At t = 0 the signal-to-noise ratio is infinite."""
    ends = torch.tensor([0.0, 999.0])
    for prediction_type, at_zero in (("epsilon", 0), ("sample", 5), ("v_prediction", 0)):
        weights = NoiseProcess("vp-continuous", prediction_type, "min-snr").loss_weight(ends)
        assert weights[0] == at_zero and weights[1].isfinite()


def test_unknown_names_are_refused() -> None:
    for wrong, key in (
        (("linear",), "schedule` must be one of vp-continuous, ddpm-linear, cosine, got 'linear'"),
        (("cosine", "noise"), "prediction_type` must be one of epsilon, sample, v_prediction, got 'noise'"),
        (("cosine", "epsilon", "snr"), "loss_weighting` must be one of uniform, min-snr, got 'snr'"),
        (("cosine", "epsilon", "uniform", "late"), "times` must be one of uniform, got 'late'"),
    ):
        with pytest.raises(InputError, match=f"`noise.{key}"):
            NoiseProcess(*wrong)


@pytest.mark.parametrize("name", PREDICTION_TYPES)
def test_predictions_and_the_noise_in_a_sample_follow_from_each_other(name: str) -> None:
    kind, alpha, sigma = PREDICTION_TYPES[name], 0.6, 0.8
    image, noise = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    back = kind.noise(kind.target(image, noise, alpha, sigma), alpha * image + sigma * noise, alpha, sigma)
    torch.testing.assert_close(back, noise)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_scheduler_is_known_by_its_process(name: str) -> None:
    saved = NoiseProcess(name, "v_prediction").build_scheduler()
    others = [DDPMScheduler(beta_schedule="scaled_linear"), FlowMatchEulerDiscreteScheduler()]
    assert [other for other, process in PROCESSES.items() if process.is_run_by(saved)] == [name]
    assert not any(process.is_run_by(other) for other in others for process in PROCESSES.values())
