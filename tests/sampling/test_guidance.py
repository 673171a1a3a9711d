"""Guidance in an interval of noise levels, and autoguidance: full sampling compared with an explicit loop."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    ModelMixin,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
)
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from dia_diffusion import UViTPipeline
from dia_diffusion.errors import InputError
from dia_diffusion.models.uvit import UViTOutput
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.sampling.generate import adapt_pipeline, generate
from dia_diffusion.sampling.load import Guide
from dia_diffusion.sampling.samplers import OWN_SAMPLER, SamplingSettings, build_scheduler
from tests.sampling.conftest import alpha_sigma
from tests.sampling.tiny_models import small_dit, small_unet, small_vae

Law = tuple[float, float]
"""Mean and standard deviation of pixels."""
OURS: list[Law] = [(-0.5, 0.2), (0.6, 0.1), (0.1, 0.4)]  # classes 0 and 1, and the null label
WORSE: list[Law] = [(-0.2, 0.3), (0.3, 0.3), (0.0, 0.5)]
LABELS = [0, 1, 1]


def expectations(law: Law, x: Any, alpha: float, sigma: float) -> tuple[Any, Any]:
    """The expected image and noise in x = alpha image + sigma noise, for Gaussian images."""
    mean, std = law
    away = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
    return mean + alpha * std**2 * away, sigma * away


class ClassGaussians(ModelMixin, ConfigMixin):
    """The exact denoiser of pixels that are Gaussian given the class; records the batch sizes of its calls."""

    @register_to_config
    def __init__(self, laws: Any, schedule: str, prediction_type: str):
        super().__init__()
        self.in_channels, self.sample_size, self.num_classes = 1, 4, len(laws) - 1
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.batches: list[int] = []

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> UViTOutput:
        self.batches.append(len(sample))
        alpha, sigma = alpha_sigma(self.config.schedule, float(timestep))
        labels = [self.num_classes] * len(sample) if class_labels is None else class_labels.tolist()
        pairs = [expectations(self.config.laws[k], x, alpha, sigma) for k, x in zip(labels, sample, strict=True)]
        image, noise = (torch.stack(list(each)) for each in zip(*pairs, strict=True))
        predicted = {"sample": image, "epsilon": noise, "velocity": noise - image}
        return UViTOutput(sample=predicted[self.config.prediction_type])


def gaussians(laws: list[Law], schedule: str = "vp-continuous", prediction_type: str = "epsilon") -> UViTPipeline:
    process = NoiseProcess(schedule=schedule, prediction_type=prediction_type)
    pipeline = UViTPipeline(
        ClassGaussians(laws, schedule, prediction_type), process.build_scheduler(), prediction_type=prediction_type
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_hand(
    schedule: str,
    timesteps: Sequence[float],
    start: Any,
    scale: float,
    interval: tuple[float, float] | None,
    worse: list[Law],
) -> Any:
    """DDIM, which is Euler's method for the flow: x' = alpha' image + sigma' noise."""
    x, levels = start, [alpha_sigma(schedule, timestep) for timestep in timesteps]
    for (alpha, sigma), (alpha_next, sigma_next) in zip(levels, [*levels[1:], (1.0, 0.0)], strict=True):
        inside = interval is None or interval[0] * alpha < sigma <= interval[1] * alpha
        rows = []
        for label, row in zip(LABELS, x, strict=True):
            good, bad = expectations(OURS[label], row, alpha, sigma), expectations(worse[label], row, alpha, sigma)
            w = scale if inside else 1.0
            image, noise = (b + w * (g - b) for g, b in zip(good, bad, strict=True))
            rows.append(alpha_next * image + sigma_next * noise)
        x = np.stack(rows)
    return x


@pytest.mark.parametrize("interval", [None, (0.3, 5.0)])
@pytest.mark.parametrize("guided_by", ["null label", "guide", "guide of another type"])
@pytest.mark.parametrize(
    ("schedule", "sampler"), [("vp-continuous", "ddim"), ("vp-continuous", "euler"), ("flow", "euler")]
)
def test_whole_samplings_of_gaussians(
    schedule: str, sampler: str, guided_by: str, interval: tuple[float, float] | None
) -> None:
    types = ("velocity", "sample") if schedule == "flow" else ("epsilon", "sample")
    pipeline = gaussians(OURS, schedule, types[0])
    guide = None
    if guided_by != "null label":
        guide = gaussians(WORSE, schedule, types[guided_by == "guide of another type"])
    pipeline.scheduler = build_scheduler(sampler, pipeline.scheduler)
    start = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = pipeline(
        class_labels=LABELS,
        latents=start,
        num_inference_steps=12,
        guidance_scale=3.0,
        guidance_interval=interval,
        guide=guide,
        output_type="latent",
    ).images
    timesteps = pipeline.scheduler.timesteps.tolist()
    worse = [OURS[2]] * 2 if guide is None else WORSE
    expected = by_hand(schedule, timesteps, start.numpy(), 3.0, interval, worse)
    # Tables of sigma / alpha are float32; for VP, Euler's method starts from noise alone, while x_T keeps some image.
    np.testing.assert_allclose(drawn.numpy(), expected, rtol=0, atol=3e-3)
    for other_scale, other_interval in ((1.0, None), (3.0, (0.3, 5.0) if interval is None else None)):
        other = by_hand(schedule, timesteps, start.numpy(), other_scale, other_interval, worse)
        assert np.abs(other - expected).max() > 0.03


@pytest.mark.parametrize(("sampler", "calls"), [("dpmsolver++", 9), ("heun", 17), ("euler-maruyama", 9)])
def test_outside_the_interval_a_step_costs_what_it_does_without_guidance(sampler: str, calls: int) -> None:
    pipeline, guide = gaussians(OURS), gaussians(WORSE)
    pipeline.scheduler = build_scheduler(sampler, pipeline.scheduler)
    settings: dict[str, Any] = {"class_labels": LABELS, "num_inference_steps": 9, "guidance_scale": 2.0}
    pipeline(**settings, guidance_interval=(0.3, 5.0), output_type="latent")
    levels = [alpha_sigma("vp-continuous", timestep) for timestep in pipeline.scheduler.timesteps.tolist()]
    inside = [0.3 * alpha < sigma <= 5 * alpha for alpha, sigma in levels]
    assert len(inside) == calls and 1 < sum(inside) < calls - 2
    assert pipeline.unet.batches == [6 if each else 3 for each in inside]
    pipeline.unet.batches.clear()
    pipeline(**settings, guidance_interval=(0.3, 5.0), guide=guide, output_type="latent")
    assert pipeline.unet.batches == [3] * calls and guide.unet.batches == [3] * sum(inside)


@pytest.mark.parametrize("by_guide", [False, True])
def test_an_interval_without_a_timestep_leaves_images_as_they_are_without_guidance(by_guide: bool) -> None:
    pipeline = gaussians(OURS)
    settings: dict[str, Any] = {"class_labels": LABELS, "num_inference_steps": 5, "output_type": "latent"}
    start = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    plain = pipeline(**settings, latents=start).images
    guidance: dict[str, Any] = {"guidance_scale": 4.0, "guide": gaussians(WORSE) if by_guide else None}
    nowhere = pipeline(**settings, latents=start, **guidance, guidance_interval=(1e4, 1e5)).images
    assert torch.equal(nowhere, plain)
    assert not torch.equal(pipeline(**settings, latents=start, **guidance).images, plain)


def as_guide(pipeline: Any) -> Guide:
    return Guide(pipeline, {"weights_hash": "w", "model_hash": "m"})


def test_an_unconditional_image_belongs_to_its_seed() -> None:
    pipeline, other = (
        DDPMPipeline(unet=small_unet(block_out_channels=widths), scheduler=DDPMScheduler())
        for widths in ((8, 16), (4, 8))
    )
    settings = SamplingSettings("dpmsolver++sde", 4, guidance_scale=2.0, guidance_interval=(0.2, 8.0))
    adapted, seeds = adapt_pipeline(pipeline, settings, as_guide(other)), [5, 3, 9]
    whole = torch.cat([images for _, images in generate(adapted, seeds)])
    alone = torch.cat([images for _, images in generate(adapted, seeds[::-1], batch_size=1)])
    assert (whole.int() - alone.flip(0).int()).abs().max() <= 1
    plain = torch.cat([images for _, images in generate(adapt_pipeline(pipeline, SamplingSettings(steps=4)), seeds)])
    assert (whole.int() - plain.int()).abs().max() > 2
    assert adapted.to_dict()["guide"] == {"weights_hash": "w", "model_hash": "m"}
    assert adapted.to_dict()["guidance_interval"] == [0.2, 8.0]
    assert not {"guide", "guidance_interval"} & SamplingSettings().to_dict({}).keys()


def test_latents_are_guided_and_a_learned_variance_is_not() -> None:
    vae, scheduler, labels = small_vae(), DDIMScheduler(), torch.tensor([2, 0])
    ours, theirs = small_dit(num_classes=3), small_dit(num_classes=3)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    settings = SamplingSettings(OWN_SAMPLER, 4, (0, 2), 3.0)
    pipeline, other = (DiTPipeline(network, vae, scheduler) for network in (ours, theirs))
    drawn = adapt_pipeline(pipeline, settings, as_guide(other)).draw([1, 2])
    x = torch.cat([torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            good, bad = (
                network(x, timestep=timestep.expand(2), class_labels=labels).sample[:, :4] for network in (ours, theirs)
            )
            x = scheduler.step(3 * good - 2 * bad, timestep, x).prev_sample
        expected = (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)


def test_a_guide_is_no_part_of_the_pipeline(tmp_path: Path, tiny_pipeline: Any) -> None:
    pipeline, guide = tiny_pipeline(3), tiny_pipeline(3)
    torch.nn.init.normal_(guide.unet.patch_embed.weight, std=0.3)
    settings: dict[str, Any] = {"class_labels": [1], "guidance_scale": 2.0, "num_inference_steps": 3, "guide": guide}

    def draw(pipe: UViTPipeline, **changes: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        return pipe(**settings | changes, generator=torch.Generator().manual_seed(0), output_type="latent").images

    expected = draw(pipeline)
    assert not torch.equal(expected, draw(pipeline, guide=None))
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {name for name in index if not name.startswith("_")} == {"unet", "scheduler"}
    assert torch.equal(draw(UViTPipeline.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"guidance_interval": (0.3, 5)},
            r"`guidance_interval` must be left out for guidance_scale 1 \(no guidance\), got \(0.3, 5\)",
        ),
        ({"guidance_scale": 2.0, "guidance_interval": (5, 0.3)}, r"two noise levels low < high, .* got \(5, 0.3\)"),
        ({"guidance_scale": 2.0, "guidance_interval": (1.0, 1.0)}, "two noise levels low < high"),
        ({"guidance_scale": 2.0, "guidance_interval": (-1.0, 1.0)}, "two noise levels low < high"),
        ({"guidance_scale": 2.0, "guidance_interval": (0.0, float("inf"))}, "two noise levels low < high"),
        ({"guidance_scale": 2.0, "guidance_interval": (1.0, float("nan"))}, "two noise levels low < high"),
        ({"guidance_scale": 2.0, "guidance_interval": (1.0,)}, "two noise levels low < high"),
        ({"guidance_scale": 2.0, "guidance_interval": 3.0}, "two noise levels low < high"),
        ({"guidance_scale": 2.0, "guidance_interval": "0.3,5"}, "two noise levels low < high"),
    ],
)  # fmt: skip
def test_invalid_intervals_are_refused(settings: dict[str, Any], said: str, tiny_pipeline: Any) -> None:
    with pytest.raises(InputError, match=said):
        tiny_pipeline(3)(class_labels=1, **settings)
    with pytest.raises(InputError, match=said):
        adapt_pipeline(tiny_pipeline(3), SamplingSettings(**settings))


def test_guides_that_do_not_fit(tiny_pipeline: Any) -> None:
    pixels = DDPMPipeline(unet=small_unet(), scheduler=DDPMScheduler())
    flow = UViTPipeline(tiny_pipeline().unet, NoiseProcess("flow", "velocity").build_scheduler(), "velocity")
    other_betas = DDPMPipeline(unet=small_unet(), scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    fewer_steps = DDPMPipeline(unet=small_unet(), scheduler=DDPMScheduler(num_train_timesteps=500))
    wide = DDPMPipeline(unet=small_unet(sample_size=(8, 16)), scheduler=DDPMScheduler())
    sde = ScoreSdeVePipeline(unet=small_unet(), scheduler=ScoreSdeVeScheduler(sigma_max=1.0))
    for guide, said in (
        (tiny_pipeline(3), "`guide` must have num_classes None, as the pipeline it guides, got 3"),
        (wide, r"`guide` must have shape \(3, 8, 8\), as the pipeline it guides, got \(3, 8, 16\)"),
        (flow, "noise process of the pipeline it guides, got another process"),
        (other_betas, "got another process"),
        (fewer_steps, "got another process"),
        (sde, "`guide` must be one of UViTPipeline, DDPMPipeline, .*, got a ScoreSdeVePipeline"),
    ):
        with pytest.raises(InputError, match=said):
            adapt_pipeline(pixels, SamplingSettings(guidance_scale=2.0), as_guide(guide))
    with pytest.raises(InputError, match="`guidance_scale` must be above 1 with a guide, got 1"):
        adapt_pipeline(pixels, SamplingSettings(), as_guide(pixels))
    with pytest.raises(InputError, match="`guide` must be left out for a ScoreSdeVePipeline, which has its own loop"):
        adapt_pipeline(sde, SamplingSettings(OWN_SAMPLER, guidance_scale=2.0), as_guide(pixels))
    with pytest.raises(InputError, match="`guide` must be a UViTPipeline, got a UViT"):
        tiny_pipeline()(guidance_scale=2.0, guide=tiny_pipeline().unet)
