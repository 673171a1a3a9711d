import itertools

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from dia_diffusion import UViTPipeline
from dia_diffusion.errors import InputError
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.sampling.generate import adapt_pipeline
from dia_diffusion.sampling.samplers import (
    SAMPLERS,
    Sampler,
    SamplingSettings,
    build_scheduler,
    check_steps,
)
from dia_diffusion.schedulers import noise_ratio
from tests.sampling.conftest import GaussianDenoiser, vp_scheduler

PREDICTION_TYPES = NoiseProcess().process.prediction_types

# Relative tolerance of the standard deviation at 50 steps. With evenly spaced timesteps, the last step starts at sigma
# 0.07, where noise hides a third of the data's standard deviation of 0.2; at 1,000 steps all are within 2.5 %.
TOLERANCE_AT_50 = {
    "ddpm": 0.22,
    "ddim": 0.14,
    "dpmsolver++": 0.015,
    "dpmsolver++3m": 0.015,
    "dpmsolver++sde": 0.02,
    "unipc": 0.025,
    "euler": 0.14,
    "euler-ancestral": 0.22,
    "heun": 0.015,
    "euler-maruyama": 0.05,
}


def sample(pipeline, name, steps, batch_size=1):
    """Pixels in [-1, 1], and the network with its records."""
    images = adapt_pipeline(pipeline, SamplingSettings(name, steps)).draw(list(range(batch_size)))
    return 2 * images - 1, pipeline.unet


def test_every_sampler_is_tested():
    assert TOLERANCE_AT_50.keys() == SAMPLERS.keys()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_from_a_gaussian_given_its_exact_network(name, prediction_type, gaussian_pipeline):
    pixels, network = sample(gaussian_pipeline(prediction_type), name, 50)
    assert abs(pixels.mean() - network.data_mean) < 0.01
    assert abs(pixels.std() / network.data_std - 1) < TOLERANCE_AT_50[name]


ALPHA_BARS = DDPMScheduler(**NoiseProcess().scheduler_config()).alphas_cumprod.double()


class TypedDenoiser(GaussianDenoiser):
    """Uses the alpha and sigma that the scheduler computes from its betas."""

    def alpha_sigma(self, timestep):
        alpha_bar = float(ALPHA_BARS[int(timestep)])
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def typed_images(given, name):
    pipeline = UViTPipeline(TypedDenoiser(given, sample_size=16).double(), vp_scheduler(given))
    return adapt_pipeline(pipeline, SamplingSettings(name, 20)).draw([0, 1])


# Only samplers with integer timesteps, for which the network and the scheduler have the same alpha and sigma.
@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "euler-ancestral"])
def test_one_network_draws_the_same_in_each_prediction_type(name):
    expected = typed_images("epsilon", name)
    assert expected.std() > 0.05
    for given in ("sample", "v_prediction"):
        torch.testing.assert_close(typed_images(given, name), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("given", "taken"), list(itertools.permutations(PREDICTION_TYPES, 2)))
def test_predictions_that_a_scheduler_does_not_take_are_converted(given, taken, monkeypatch):
    expected = typed_images(given, "ddim")
    monkeypatch.setattr(SAMPLERS, "_rows", dict(SAMPLERS))
    row = SAMPLERS["ddim"]
    SAMPLERS.register("one-type", Sampler(row.scheduler, row.settings, prediction_types=(taken,)))
    with pytest.raises(InputError, match=f"`prediction_type` must be one of {taken} for one-type, got '{given}'"):
        build_scheduler("one-type", vp_scheduler(given))  # a scheduler alone has nothing that converts
    torch.testing.assert_close(typed_images(given, "one-type"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_ratio_is_sigma_over_alpha(name):
    scheduler = build_scheduler(name, vp_scheduler())
    check_steps(scheduler, 50)
    timesteps = scheduler.timesteps[scheduler.timesteps > 5]  # below that, betas differ from the closed-form process
    alpha, sigma = NoiseProcess().process.alpha_sigma(timesteps)
    torch.testing.assert_close(noise_ratio(scheduler)(timesteps).double(), sigma / alpha, rtol=0.02, atol=0)


@pytest.mark.parametrize(("steps", "tolerance"), [(250, 0.08), pytest.param(1000, 0.025, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_many_steps_follow_the_process(name, steps, tolerance, gaussian_pipeline):
    pixels, network = sample(gaussian_pipeline(), name, steps)
    assert abs(pixels.mean() - network.data_mean) < 0.01
    assert abs(pixels.std() / network.data_std - 1) < tolerance
    # At every timestep the network's input has the standard deviation of x_t: both scale and time are right.
    assert max(map(abs, network.std_errors)) < tolerance
    assert network.timesteps[0] >= 998
    assert network.timesteps == sorted(network.timesteps, reverse=True)
    assert network.timesteps[-1] <= 1000 / steps


@pytest.mark.parametrize(
    ("name", "steps"), [("heun", 7), *itertools.product(sorted(set(SAMPLERS) - {"heun"}), (1, 2, 10))]
)
def test_few_steps_are_finite_and_start_from_pure_noise(name, steps, gaussian_pipeline):
    pixels, network = sample(gaussian_pipeline(), name, steps)
    assert pixels.isfinite().all()
    assert len(network.timesteps) == (13 if name == "heun" else steps)
    assert name != "heun" or any(not timestep.is_integer() for timestep in network.timesteps)
    assert network.timesteps[0] >= 998
    assert abs(network.std_errors[0]) < 0.02


def test_ddim_is_ddim():
    config = NoiseProcess().scheduler_config()
    reference = DDIMScheduler(**config, timestep_spacing="trailing", clip_sample=False)
    ours = build_scheduler("ddim", DDPMScheduler(**config))
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = x
    for scheduler in (reference, ours):
        scheduler.set_timesteps(50)
    assert ours.timesteps.tolist() == reference.timesteps.tolist()
    for timestep in ours.timesteps:
        expected = reference.step(torch.tanh(expected), timestep, expected).prev_sample
        x = ours.step(torch.tanh(x), timestep, x).prev_sample
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_keeps_the_noise_process_and_nothing_else(name, caplog):
    theirs = DDPMScheduler(
        **NoiseProcess(prediction_type="v_prediction").scheduler_config(), timestep_spacing="leading", thresholding=True
    )
    scheduler = build_scheduler(name, theirs)
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.trained_betas == theirs.config.trained_betas
    assert not scheduler.config.get("thresholding")
    assert not caplog.records
    if name != "euler-maruyama":
        np.testing.assert_allclose(scheduler.alphas_cumprod, theirs.alphas_cumprod)


def test_unknown_names_and_other_processes():
    with pytest.raises(InputError, match=r"`sampler` must be one of ddpm, ddim, dpmsolver\+\+.*, got 'dpm'"):
        build_scheduler("dpm", DDPMScheduler())
    with pytest.raises(InputError, match="vp-continuous"):
        build_scheduler("euler-maruyama", DDPMScheduler())
    with pytest.raises(InputError, match="must be one of own for the process of a FlowMatchEulerDiscreteScheduler"):
        build_scheduler("ddim", FlowMatchEulerDiscreteScheduler(invert_sigmas=True))


@pytest.mark.parametrize(
    ("name", "steps", "accepted"),
    [
        ("ddim", 0, "1 to 1000"),
        ("unipc", 1001, "1 to 1000"),
        ("heun", 2, "7 to 1000"),
        ("euler-maruyama", -1, "1 or more"),
    ],
)
def test_impossible_numbers_of_steps(name, steps, accepted):
    scheduler = build_scheduler(name, DDPMScheduler(**NoiseProcess().scheduler_config()))
    with pytest.raises(InputError, match=f"`steps` must be {accepted} for .*, got {steps}"):
        check_steps(scheduler, steps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_accepted_numbers_of_steps_are_kept(name):
    scheduler = build_scheduler(name, DDPMScheduler(**NoiseProcess().scheduler_config()))
    refused = 0
    for steps in range(7, 1001, 97):
        try:
            check_steps(scheduler, steps)
        except InputError:
            refused += 1
            continue
        assert len(scheduler.timesteps) == (2 * steps - 1 if name == "heun" else steps)
        assert 0 <= scheduler.timesteps.min() <= scheduler.timesteps.max() <= 999
    assert refused <= 1
