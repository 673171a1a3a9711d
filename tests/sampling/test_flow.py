"""The flow's samplers against the closed form of Gaussian data, with the exact velocity."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from dia_diffusion import UViTPipeline
from dia_diffusion.errors import InputError
from dia_diffusion.models.uvit import UViTOutput
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.sampling.generate import adapt_pipeline
from dia_diffusion.sampling.samplers import OWN_SAMPLER, SAMPLERS, SamplingSettings
from dia_diffusion.schedulers import noise_ratio
from tests.sampling.conftest import GaussianDenoiser

# Relative tolerance of the standard deviation at 50 steps.
TOLERANCE_AT_50 = {"dpmsolver++": 0.02, "dpmsolver++sde": 0.05, "unipc": 0.015, "euler": 0.06, "heun": 0.01}


def flow_pipeline(prediction_type="velocity", shift=1.0):
    process = NoiseProcess("flow", prediction_type, shift=shift)
    network = GaussianDenoiser(prediction_type, schedule="flow")
    pipeline = UViTPipeline(network, process.build_scheduler(), prediction_type)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(name, steps, prediction_type="velocity", shift=1.0):
    """Pixels in [-1, 1], and the network with its records."""
    adapted = adapt_pipeline(flow_pipeline(prediction_type, shift), SamplingSettings(name, steps))
    return 2 * adapted.draw([0]) - 1, adapted.runner.unet


def test_every_sampler_of_the_flow_is_tested():
    assert TOLERANCE_AT_50.keys() == {name for name, sampler in SAMPLERS.items() if sampler.flow is not None}


@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
@pytest.mark.parametrize("name", TOLERANCE_AT_50)
def test_draws_from_a_gaussian_given_its_exact_network(name, prediction_type):
    pixels, network = draw(name, 50, prediction_type)
    assert abs(pixels.mean() - network.data_mean) < 0.005
    assert abs(pixels.std() / network.data_std - 1) < TOLERANCE_AT_50[name]
    # At every timestep the network's input has the standard deviation of x_t: both scale and time are right.
    assert max(map(abs, network.std_errors)) < 0.05


@pytest.mark.parametrize("name", TOLERANCE_AT_50)
def test_many_steps_follow_the_process(name):
    pixels, network = draw(name, 300)
    assert abs(pixels.std() / network.data_std - 1) < 0.01
    assert max(map(abs, network.std_errors)) < 0.015
    assert network.timesteps == sorted(network.timesteps, reverse=True)
    assert network.timesteps[0] >= 999 and network.timesteps[-1] < 5


@pytest.mark.parametrize("name", TOLERANCE_AT_50)
def test_the_network_is_called_at_1000_sigma(name):
    adapted = adapt_pipeline(flow_pipeline(), SamplingSettings(name, 7))
    adapted.draw([0])
    assert any(not timestep.is_integer() for timestep in adapted.runner.unet.timesteps)
    sigmas = adapted.runner.scheduler.sigmas[:-1]
    if name == "heun":  # calls the network again at the end of each step
        sigmas = sigmas[[0, *range(1, len(sigmas))]]
    assert sorted(set(adapted.runner.unet.timesteps)) == pytest.approx(sorted(set((1000 * sigmas).tolist())))


@pytest.mark.parametrize("steps", [1, 3, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", [*TOLERANCE_AT_50, OWN_SAMPLER])
def test_numbers_of_steps(name, steps):
    pipeline = flow_pipeline("sample")
    pipeline.unet.sample_size = 2
    adapted = adapt_pipeline(pipeline, SamplingSettings(name, steps))
    assert adapted.draw([0]).isfinite().all()
    assert len(adapted.runner.unet.timesteps) == (2 * steps - 1 if name == "heun" else steps)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("taken", ["flow_prediction", "sample"])
@pytest.mark.parametrize("given", ["velocity", "sample"])
def test_a_scheduler_of_diffusers_in_the_pipeline(scheduler, taken, given):
    """It draws the same images as the sampler: timesteps are not rounded, and predictions are converted."""
    name = "unipc" if scheduler is UniPCMultistepScheduler else "dpmsolver++"
    expected = adapt_pipeline(flow_pipeline(), SamplingSettings(name, 7)).draw([3])
    pipeline = flow_pipeline(given)
    pipeline.scheduler = scheduler(use_flow_sigmas=True, prediction_type=taken)
    (images,) = pipeline(
        generator=[torch.Generator().manual_seed(3)], num_inference_steps=7, output_type="pt", return_dict=False
    )
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    assert any(not timestep.is_integer() for timestep in pipeline.unet.timesteps)


@pytest.mark.parametrize("name", TOLERANCE_AT_50)
def test_samplers_take_over_the_shift(name):
    ratios = []
    for shift in (1.0, 3.0):
        adapted = adapt_pipeline(flow_pipeline(shift=shift), SamplingSettings(name, 9))
        adapted.draw([0])
        timesteps = torch.tensor(adapted.runner.unet.timesteps)[1:]
        ratios.append(noise_ratio(adapted.runner.scheduler)(timesteps))
        torch.testing.assert_close(ratios[-1], timesteps / (1000 - timesteps))
    torch.testing.assert_close(ratios[1], 3 * ratios[0], rtol=0.03, atol=0)


@pytest.mark.parametrize("name", TOLERANCE_AT_50)
def test_a_predicted_image_is_not_worse_in_the_end(name):
    """Near t = 0, a velocity computed from an image has many times the image's error."""

    class Biased(GaussianDenoiser):
        def forward(self, sample, timestep, class_labels=None):
            return UViTOutput(sample=super().forward(sample, timestep).sample + 0.1)

    pipeline = flow_pipeline("sample")
    exact = adapt_pipeline(pipeline, SamplingSettings(name, 10)).draw([0])
    pipeline.unet.__class__ = Biased
    biased = adapt_pipeline(pipeline, SamplingSettings(name, 10)).draw([0])
    assert 0 < (2 * biased - 2 * exact).abs().max() < 0.3  # 1.8 on a grid that ends at 1/1000


def test_refusals_of_other_samplers_list_the_accepted_ones():
    accepted = r"dpmsolver\+\+, dpmsolver\+\+sde, unipc, euler, heun, own"
    for name in SAMPLERS.keys() - TOLERANCE_AT_50.keys():
        with pytest.raises(InputError, match=f"`sampler` must be one of {accepted} for the process of a .*, got "):
            adapt_pipeline(flow_pipeline(), SamplingSettings(name, 50))
