"""Sampling and measuring on a GPU: images and features don't depend on batches, offloading or TF32."""

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from dia_diffusion import UViT, UViTPipeline
from dia_diffusion.evaluation.features import build_features
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.sampling.generate import adapt_pipeline, generate
from dia_diffusion.sampling.samplers import OWN_SAMPLER, SAMPLERS, SamplingSettings, build_scheduler
from tests.gpu.conftest import DEVICE, ON_CPU
from tests.pipelines.conftest import SMALL

GRAY_LEVEL = 1 / 255


def pipeline(sampler: str = "dpmsolver++", device: torch.device = DEVICE, **changes: Any) -> UViTPipeline:
    torch.manual_seed(0)
    unet = UViT(**{"attention": "dia-lstm", **SMALL, **changes}).eval()
    torch.nn.init.normal_(unet.decoder.weight, std=0.5)  # so that images differ from noise, and from each other
    trained = DDPMScheduler(**NoiseProcess().scheduler_config())
    made = UViTPipeline(unet, build_scheduler(sampler, trained))
    made.set_progress_bar_config(disable=True)
    return made.to(device)


def images(drawn: UViTPipeline, seeds: list[int], batch_size: int) -> torch.Tensor:
    """Images of the seeds, (B, 3, H, W), int levels 0 to 255."""
    adapted = adapt_pipeline(drawn, SamplingSettings(OWN_SAMPLER, steps=10))
    parts = [part for _, part in generate(adapted, seeds, batch_size)]
    return torch.cat(parts).int()


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"euler-ancestral"}))
def test_an_image_belongs_to_its_seed(sampler: str) -> None:
    drawn, seeds = pipeline(sampler), list(range(16))
    whole = images(drawn, seeds, 16)
    for batch_size in (1, 5):
        assert (images(drawn, seeds, batch_size) - whole).abs().max() <= 1
    assert (images(drawn, seeds[::-1], 16).flip(0) - whole).abs().max() <= 1
    on_cpu = images(pipeline(sampler, torch.device("cpu")), seeds, 16)
    assert (on_cpu - whole).float().abs().mean() < 1, "gray levels, from the same noise; others differ by dozens"


@pytest.mark.parametrize("way", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("attention", ["dia-lstm", "se"])
def test_an_offloaded_pipeline_draws_the_same(way: str, attention: str) -> None:
    if ON_CPU and way == "enable_sequential_cpu_offload":
        pytest.skip("Accelerate fails where the device is the CPU itself, with diffusers' own pipelines too")

    def call(drawn: UViTPipeline) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return drawn(batch_size=2, generator=generator, num_inference_steps=5, output_type="pt").images.cpu()

    expected = call(pipeline(attention=attention))
    offloaded = pipeline(device=torch.device("cpu"), attention=attention)
    getattr(offloaded, way)(device=DEVICE)
    assert (call(offloaded) - expected).abs().max() < GRAY_LEVEL
    assert (call(offloaded) - expected).abs().max() < GRAY_LEVEL, "and once more, after what the first call left"


@pytest.mark.parametrize("new", [False, True], ids=["allow_tf32", "fp32_precision"])
def test_features_do_not_use_tf32(new: bool) -> None:
    drawn = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8, generator=drawn)
    extractor, on_cpu = build_features("cifar10", str(DEVICE)), build_features("cifar10", "cpu")
    exact = extractor(pixels).cpu()
    torch.testing.assert_close(exact, on_cpu(pixels), rtol=1e-4, atol=1e-4)  # TF32 has a precision of 1e-3
    try:
        if new:
            torch.backends.fp32_precision = "tf32"
        else:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        assert torch.equal(extractor(pixels).cpu(), exact)
    finally:
        if new:
            torch.backends.fp32_precision = "none"
        else:
            torch.backends.cuda.matmul.allow_tf32 = False
    assert ON_CPU or extractor(pixels).device.type == "cuda"
