import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from dia_diffusion.errors import InputError
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.sampling.euler_maruyama import EulerMaruyamaScheduler


def config(prediction_type="epsilon", schedule="vp-continuous"):
    return NoiseProcess(schedule=schedule, prediction_type=prediction_type).scheduler_config()


def network(x, k):
    """A smooth function that stands in for the noise in x."""
    return torch.tanh(0.8 * x + 0.001 * k)


def brute_force(x, steps, generator):
    """dx = [f - g^2 score] dt + g dw over each time interval, written out for epsilon."""
    times = [0.0] + [1e-3 + (1 - 1e-3) * i / (steps - 1) for i in range(steps)]
    for i in range(steps, 0, -1):
        t, dt = times[i], times[i - 1] - times[i]
        g2 = 0.1 + 19.9 * t
        sigma = math.sqrt(1 - math.exp(-(0.1 * t + 0.5 * 19.9 * t * t)))
        score = -network(x, 999 * t) / sigma
        x = x + (-0.5 * g2 * x - g2 * score) * dt
        if i > 1:
            x = x + math.sqrt(g2 * -dt) * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return x


def run(scheduler, x, steps, generator, predict):
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps
    for timestep in scheduler.timesteps:
        (x,) = scheduler.step(predict(x, timestep.double()), timestep, x, generator=generator, return_dict=False)
    return x


@pytest.mark.parametrize("steps", [2, 7, 100])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_equals_the_written_out_loop(steps, prediction_type):
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def predict(x, k):
        alpha_bar = math.exp(-(0.1 * k / 999 + 0.5 * 19.9 * (k / 999) ** 2))
        alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        noise = network(x, k)
        image = (x - sigma * noise) / alpha
        return {"epsilon": noise, "sample": image, "v_prediction": alpha * noise - sigma * image}[prediction_type]

    ours = run(
        EulerMaruyamaScheduler.from_config(config(prediction_type)), x, steps, torch.Generator().manual_seed(1), predict
    )
    expected = brute_force(x, steps, torch.Generator().manual_seed(1))
    # The network receives float32 timesteps.
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", [DPMSolverMultistepScheduler, DDPMScheduler, DDIMScheduler])
def test_from_the_config_of_other_schedulers_and_back(other, caplog):
    theirs = other(**config("v_prediction"))
    ours = EulerMaruyamaScheduler.from_config(theirs.config)
    assert ours.config.prediction_type == "v_prediction"
    back = other.from_config(ours.config)
    torch.testing.assert_close(back.alphas_cumprod, theirs.alphas_cumprod)
    assert not caplog.records


@pytest.mark.parametrize(
    "bad",
    [{}, config(schedule="ddpm-linear"), {**config(), "trained_betas": config()["trained_betas"][:10]}],
    ids=["no betas", "betas of another process", "too few betas"],
)
def test_refuses_another_process(bad):
    with pytest.raises(InputError, match="vp-continuous"):
        EulerMaruyamaScheduler.from_config(bad)


def test_refuses_an_unknown_prediction_type():
    with pytest.raises(InputError, match="flow"):
        EulerMaruyamaScheduler.from_config({**config(), "prediction_type": "flow"})
