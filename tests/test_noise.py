"""Noise processes compared with numerical integration, diffusers' schedulers and the definitions."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from dia_diffusion.errors import InputError
from dia_diffusion.noise import PROCESSES, NoiseProcess
from dia_diffusion.predictions import PREDICTION_TYPES, convert_prediction


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


def test_timesteps_cover_the_networks_range() -> None:
    uniform = torch.tensor([0.0, 0.5, 0.999999])
    assert NoiseProcess("vp-continuous").timestep(uniform).tolist() == pytest.approx([0, 499.5, 999], abs=1e-2)
    assert NoiseProcess("cosine").timestep(uniform).tolist() == [0, 500, 999]


@pytest.mark.parametrize("schedule", ["vp-continuous", "ddpm-linear"])
def test_min_snr_weighs_all_prediction_types_the_same(schedule: str) -> None:
    """The weighted loss of a wrong x_0 is the same for each prediction type."""
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
        (("linear",), "schedule` must be one of vp-continuous, ddpm-linear, cosine, flow, got 'linear'"),
        (
            ("cosine", "velocity"),
            "prediction_type` must be one of epsilon, sample, v_prediction for noise.schedule cosine, got 'velocity'",
        ),
        (
            ("flow", "epsilon"),
            "prediction_type` must be one of velocity, sample for noise.schedule flow, got 'epsilon'",
        ),
        (("cosine", "epsilon", "snr"), "loss_weighting` must be one of uniform, min-snr, got 'snr'"),
        (
            ("cosine", "epsilon", "uniform", "late"),
            "times` must be one of uniform, logit-normal, log-normal, got 'late'",
        ),
    ):
        with pytest.raises(InputError, match=f"`noise.{key}"):
            NoiseProcess(*wrong)


@pytest.mark.parametrize("name", PREDICTION_TYPES)
def test_predictions_and_the_noise_in_a_sample_follow_from_each_other(name: str) -> None:
    kind, alpha, sigma = PREDICTION_TYPES[name], 0.6, 0.8
    image, noise = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    back = kind.noise(kind.target(image, noise, alpha, sigma), alpha * image + sigma * noise, alpha, sigma)
    torch.testing.assert_close(back, noise)


@pytest.mark.parametrize("given", PREDICTION_TYPES)
@pytest.mark.parametrize("wanted", PREDICTION_TYPES)
def test_predictions_are_converted(given: str, wanted: str) -> None:
    image, noise = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    prediction, expected = (PREDICTION_TYPES[name].target(image, noise, 0.6, 0.8) for name in (given, wanted))
    converted = convert_prediction(prediction, 0.6 * image + 0.8 * noise, 0.6, 0.8, given, wanted)
    torch.testing.assert_close(converted, expected)


def test_an_image_and_a_velocity_follow_from_each_other_where_alpha_is_zero() -> None:
    image, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(convert_prediction(image, noise, 0.0, 1.0, "sample", "velocity"), noise - image)
    torch.testing.assert_close(convert_prediction(noise - image, noise, 0.0, 1.0, "velocity", "sample"), image)


def test_the_flow_is_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    x, noise = torch.randn(1000, 1, 2, 2), torch.randn(1000, 1, 2, 2)
    mixed, velocity = NoiseProcess("flow", "velocity").mix(x, noise, scheduler.timesteps)
    torch.testing.assert_close(mixed, scheduler.scale_noise(x, scheduler.timesteps, noise))
    assert torch.equal(velocity, noise - x)


@pytest.mark.parametrize("loss_weighting", ["uniform", "min-snr"])
def test_a_flow_that_predicts_images_has_the_loss_of_the_velocity(loss_weighting: str) -> None:
    """For t of 0.05 or more; x_t = x_0 + t velocity."""
    x, noise, wrong_x = (torch.randn(4, 1, 4, 4) for _ in range(3))
    timestep = torch.tensor([50.0, 200.0, 700.0, 1000.0])
    t = (timestep / 1000)[:, None, None, None]
    losses = []
    for name, prediction in (("sample", wrong_x), ("velocity", ((1 - t) * x + t * noise - wrong_x) / t)):
        process = NoiseProcess("flow", name, loss_weighting)
        _, target = process.mix(x, noise, timestep)
        losses.append((prediction - target).square().mean((1, 2, 3)) * process.loss_weight(timestep))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)


def test_the_ends_of_the_flow() -> None:
    ends = torch.tensor([0.0, 20.0, 1000.0])
    assert NoiseProcess("flow", "velocity").loss_weight(ends).tolist() == [1, 1, 1]
    assert NoiseProcess("flow", "sample").loss_weight(ends).tolist() == pytest.approx([400, 400, 1])
    for prediction_type in ("velocity", "sample"):
        assert NoiseProcess("flow", prediction_type, "min-snr").loss_weight(ends).isfinite().all()


@pytest.mark.parametrize("name", PROCESSES)
def test_a_scheduler_is_known_by_its_process(name: str) -> None:
    saved = NoiseProcess(name, PROCESSES[name].prediction_types[-1]).build_scheduler()
    others = [
        DDPMScheduler(beta_schedule="scaled_linear"),
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=500),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    ]
    flows = [FlowMatchHeunDiscreteScheduler(), DPMSolverMultistepScheduler(use_flow_sigmas=True)]
    assert [other for other, process in PROCESSES.items() if process.is_run_by(saved)] == [name]
    assert not any(process.is_run_by(other) for other in others for process in PROCESSES.values())
    assert all(PROCESSES[name].is_run_by(flow) == (name == "flow") for flow in flows)
