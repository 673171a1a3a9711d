"""Sampling from diffusers' pipelines: the images that their own calls draw, each determined by its seed."""

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    CogVideoXDDIMScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    EDMEulerScheduler,
    ImagePipelineOutput,
    LDMPipeline,
    PNDMPipeline,
    PNDMScheduler,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
    UNet2DConditionModel,
)

from dia_diffusion.errors import InputError, RunError
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.pipelines.pipeline_uvit import UViTPipeline
from dia_diffusion.sampling.generate import adapt_pipeline, generate
from dia_diffusion.sampling.samplers import OWN_SAMPLER, SAMPLERS, SamplingSettings
from tests.sampling.tiny_models import NULL_LABEL, small_dit, small_unet, small_vae, small_vqvae

SEEDS = [5, 3, 2**31 + 7]


def dit_pipeline(scheduler=None, **changes):
    return DiTPipeline(transformer=small_dit(**changes), vae=small_vae(), scheduler=scheduler or DDIMScheduler())


def consistency(**changes):
    return ConsistencyModelPipeline(unet=small_unet(**changes), scheduler=CMStochasticIterativeScheduler(sigma_max=2.0))


MAKE = {
    "ddpm": lambda: DDPMPipeline(unet=small_unet(), scheduler=DDPMScheduler()),
    "ddpm, learned variance": lambda: DDPMPipeline(
        unet=small_unet(out_channels=6), scheduler=DDPMScheduler(variance_type="learned_range")
    ),
    "ddpm, other schedule": lambda: DDPMPipeline(
        unet=small_unet(), scheduler=DDPMScheduler(beta_schedule="sigmoid", clip_sample=False)
    ),
    "ddpm, gray": lambda: DDPMPipeline(unet=small_unet(in_channels=1, out_channels=1), scheduler=DDPMScheduler()),
    "ddpm, wide": lambda: DDPMPipeline(unet=small_unet(sample_size=(8, 16)), scheduler=DDPMScheduler()),
    "ddim": lambda: DDIMPipeline(unet=small_unet(), scheduler=DDIMScheduler(set_alpha_to_one=False, steps_offset=1)),
    "pndm": lambda: PNDMPipeline(unet=small_unet(), scheduler=PNDMScheduler()),
    "consistency": consistency,
    "ldm": lambda: LDMPipeline(unet=small_unet(sample_size=4), vqvae=small_vqvae(), scheduler=DDIMScheduler()),
    "sde": lambda: ScoreSdeVePipeline(
        unet=small_unet(time_embedding_type="fourier"), scheduler=ScoreSdeVeScheduler(sigma_max=1.0)
    ),
}
SHAPES = {"ddpm, gray": (1, 8, 8), "ddpm, wide": (3, 8, 16)}


def adapt(pipeline, sampler=OWN_SAMPLER, steps=5, **settings):
    return adapt_pipeline(pipeline, SamplingSettings(sampler, steps, **settings))


def drawn(pipeline, sampler=OWN_SAMPLER, steps=5, seeds=SEEDS, batch_size=3, **settings):
    """uint8 images (N, C, H, W) in the order of the seeds, drawn as by the commands."""
    adapted = adapt(pipeline, sampler, steps, **settings)
    return torch.cat([images for _, images in generate(adapted, seeds, batch_size)])


def generators(seeds=SEEDS):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def as_channels_first(images):
    return torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2)


def as_uint8(images):
    return (as_channels_first(images) * 255).round().to(torch.uint8)


def largest_difference(images, others):
    assert images.shape == others.shape
    return int((images.int() - others.int()).abs().max())


@pytest.mark.parametrize("kind", MAKE)
def test_own_gives_the_images_that_the_pipeline_itself_gives(kind):
    """Ours draws three images in one batch and theirs one by one, so an image depends on its seed alone."""
    pipeline = MAKE[kind]()
    ours = drawn(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    theirs = [
        pipeline(generator=torch.Generator().manual_seed(seed), num_inference_steps=5, output_type="np").images[0]
        for seed in SEEDS
    ]
    assert ours.shape[1:] == SHAPES.get(kind, (3, 8, 8)) == adapt(pipeline).image_shape
    assert largest_difference(ours, as_uint8(theirs)) <= 1
    assert ours.float().std() > 1 and largest_difference(ours[:1], ours[1:2]) > 2


@pytest.mark.parametrize("out_channels", [4, 8])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_dit_gives_the_images_of_dit_pipeline(scale, out_channels):
    pipeline, labels = dit_pipeline(out_channels=out_channels), [999, 0, 7]
    classes = (1, 1, 7, 0, 1, 999, 1)  # the seeds are 5, 3 and 2 modulo 7
    ours = adapt(pipeline, classes=classes, guidance_scale=scale).draw(SEEDS)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(labels, scale, generators(), num_inference_steps=5, output_type="np").images
    torch.testing.assert_close(ours, as_channels_first(theirs), rtol=1e-4, atol=1e-4)
    assert ours.std() > 0.01 and adapt(pipeline).num_classes == NULL_LABEL
    assert (ours - adapt(pipeline, classes=(1, 2, 3), guidance_scale=scale).draw(SEEDS)).abs().max() > 0.01


def test_class_conditional_unets_draw_as_a_plain_loop_does():
    unet, scheduler = small_unet(num_class_embeds=4), DDIMScheduler()
    torch.nn.init.normal_(unet.class_embedding.weight, std=3)
    ours = drawn(DDPMPipeline(unet=unet, scheduler=scheduler), classes=(3, 1))  # seeds are odd: 1, 1, 1
    x = torch.cat([torch.randn(1, 3, 8, 8, generator=generator) for generator in generators()])
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            prediction = unet(x, timestep, torch.tensor([1, 1, 1])).sample
            x = scheduler.step(prediction, timestep, x).prev_sample
    assert largest_difference(ours, as_uint8((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))) <= 1
    assert largest_difference(ours, drawn(DDPMPipeline(unet=unet, scheduler=scheduler), classes=(0,))) > 10


def test_consistency_models_take_classes():
    pipeline = consistency(num_class_embeds=4)
    torch.nn.init.normal_(pipeline.unet.class_embedding.weight, std=3)
    ours = drawn(pipeline, classes=(2,))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(3, [2, 2, 2], 5, generator=generators(), output_type="np").images
    assert largest_difference(ours, as_uint8(theirs)) <= 1


class GlobalNoisePipeline(DiffusionPipeline):
    """Takes class labels but no generator."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self, class_labels, num_inference_steps, output_type):
        noise = torch.rand(len(class_labels), 8, 8, 3)
        labels = torch.tensor(class_labels)[:, None, None, None]
        return ImagePipelineOutput(images=((noise + labels) / 4).numpy())


def test_an_image_belongs_to_its_seed_where_a_loop_draws_from_the_global_generator():
    pipeline = GlobalNoisePipeline(unet=small_unet(num_class_embeds=4), scheduler=DDPMScheduler())
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = drawn(pipeline, classes=(1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert largest_difference(whole[[2, 0]], drawn(pipeline, seeds=[SEEDS[2], SEEDS[0]], classes=(1, 2))) == 0
    assert largest_difference(whole[:1], whole[1:2]) > 10
    assert whole.min() >= 2 * 255 / 4 - 1, "the seeds are odd, so theirs is the second class"


def test_an_image_of_latents_belongs_to_its_seed():
    pipeline = dit_pipeline(DDPMScheduler(), num_classes=3)
    whole = drawn(pipeline)
    assert largest_difference(whole[:1], whole[1:2]) > 2
    assert largest_difference(whole.flip(0), drawn(pipeline, seeds=SEEDS[::-1], batch_size=2)) <= 1


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"euler-maruyama"}))
def test_samplers_for_latents_too(sampler):
    for pipeline in (dit_pipeline(num_classes=3), MAKE["ldm"]()):
        images = drawn(pipeline, sampler, steps=7)
        assert images.shape == (3, 3, 8, 8)
        assert images.float().std() > 1


def test_latents_are_not_clipped():
    for pipeline, clipped in ((dit_pipeline(), False), (MAKE["ddpm"](), True)):
        adapted = adapt(pipeline, "ddpm")
        assert adapted.runner.scheduler.config.clip_sample is clipped
        assert adapted.scheduler_settings == {"timestep_spacing": "trailing", "clip_sample": clipped}


def test_own_is_recorded_with_its_scheduler():
    betas = NoiseProcess().scheduler_config()
    settings = adapt(DDPMPipeline(unet=small_unet(), scheduler=DDPMScheduler(**betas))).scheduler_settings
    assert (settings["class"], settings["clip_sample"]) == ("DDPMScheduler", True)
    assert settings["trained_betas"].startswith("sha256:")
    others = {**betas, "trained_betas": [beta / 2 for beta in betas["trained_betas"]]}
    pipeline = DDPMPipeline(unet=small_unet(), scheduler=DDPMScheduler(**others))
    assert adapt(pipeline).scheduler_settings["trained_betas"] != settings["trained_betas"]


def test_a_sampler_can_be_chosen_again_and_own_comes_back():
    pipeline = MAKE["ddpm"]()
    for name in ("dpmsolver++", "heun"):
        adapt(pipeline, name, steps=7)
    assert adapt(pipeline).runner.scheduler.config == DDPMScheduler().config


def test_progress_adds_up_to_the_images():
    done = []
    list(generate(adapt(MAKE["sde"](), steps=2), SEEDS, batch_size=2, progress=done.append))
    assert sum(done) == 3


def no_timesteps():
    scheduler = DDPMScheduler()
    scheduler.register_to_config(num_train_timesteps=0)
    return scheduler


@pytest.mark.parametrize(
    ("pipeline", "settings", "said"),
    [
        ("ddpm", {"classes": (0,)}, "unconditional"),
        ("ddpm", {"guidance_scale": 2.0}, "unconditional"),
        ("dit", {"classes": (0, 3)}, r"`classes` must be one or more of 0 to 2, got \[0, 3\]"),
        ("dit", {"classes": (-1,)}, r"got \[-1\]"),
        ("dit", {"classes": ()}, r"got \[\]"),
        ("dit", {"guidance_scale": 0.5}, r"`guidance_scale` must be 1 \(no guidance\) or more, got 0.5"),
        ("dit", {"guidance_scale": float("nan")}, r"must be 1 \(no guidance\) or more, got nan"),
        ("dit", {"sampler": "euler-maruyama"}, "vp-continuous"),
        ("unet by class", {"guidance_scale": 2.0}, "without a null label"),
        ("unet by class", {"classes": (4,)}, "`classes` must be one or more of 0 to 3"),
        ("consistency", {}, "`sampler` must be one of own for the process of a CMStochasticIterativeScheduler"),
        ("consistency", {"sampler": "own", "steps": 41}, "`steps` must be 1 to 40 for"),
        ("pndm", {"sampler": "own", "steps": 3}, "`steps` must be a number that PNDMScheduler accepts .*, got 3"),
        ("sde", {}, "must be own for a ScoreSdeVePipeline, which has its own loop"),
        ("sde", {"sampler": "plms"}, "must be own for a ScoreSdeVePipeline, which has its own loop, got 'plms'"),
        ("ddpm, other schedule", {}, "`sampler` must be own for the beta_schedule 'sigmoid' of this DDPMScheduler"),
        ("edm", {}, "one of own for the process of a EDMEulerScheduler"),
        ("shifted", {}, "one of own for the process of a CogVideoXDDIMScheduler"),
        ("no timesteps", {}, "`num_train_timesteps` must be 1 or more for DPMSolverMultistepScheduler, got 0"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(pipeline, settings, said):
    make = MAKE | {
        "dit": lambda: dit_pipeline(num_classes=3),
        "unet by class": lambda: DDPMPipeline(unet=small_unet(num_class_embeds=4), scheduler=DDPMScheduler()),
        "edm": lambda: DDPMPipeline(unet=small_unet(), scheduler=EDMEulerScheduler()),
        "shifted": lambda: DDPMPipeline(unet=small_unet(), scheduler=CogVideoXDDIMScheduler(snr_shift_scale=3.0)),
        "no timesteps": lambda: DDPMPipeline(unet=small_unet(), scheduler=no_timesteps()),
    }
    with pytest.raises(InputError, match=said) as error:
        adapt_pipeline(make[pipeline](), SamplingSettings(**{"steps": 2} | settings))
    assert "\n" not in str(error.value)


def test_a_zero_snr_process_is_followed_or_refused():
    pipeline = DDPMPipeline(unet=small_unet(), scheduler=DDIMScheduler(rescale_betas_zero_snr=True))
    assert float(adapt(pipeline, "ddpm").runner.scheduler.alphas_cumprod[-1]) < 1e-6
    with pytest.raises(InputError, match=r"must be one for zero SNR, .*, got 'heun'"):
        adapt(pipeline, "heun")


def test_networks_that_can_not_be_sampled_are_one_line():
    conditioned = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    for unet, said in (
        (conditioned, "unet of a DDPMPipeline must be a UViT or UNet2DModel .*, got a UNet2DConditionModel"),
        (small_unet(class_embed_type="timestep"), r"must be None .*, got 'timestep'"),
        (small_unet(sample_size=None), "`sample_size` of the model must be"),
        (small_unet(in_channels=4, out_channels=4), "must have 1 or 3 channels, got 4"),
    ):
        with pytest.raises(InputError, match=said):
            adapt(DDPMPipeline(unet=unet, scheduler=DDPMScheduler()))


def test_a_vae_with_an_unknown_factor_is_refused():
    with pytest.raises(InputError, match=r"vae of a DiTPipeline must be one of AutoencoderKL, .*, got a UNet2DModel"):
        adapt(DiTPipeline(transformer=small_dit(), vae=small_unet(), scheduler=DDIMScheduler()))


def test_a_uvit_pipeline_takes_other_networks_and_its_subclasses_are_refused():
    parts = {"unet": small_unet(), "scheduler": DDPMScheduler()}
    assert largest_difference(drawn(UViTPipeline(**parts)), drawn(DDPMPipeline(**parts))) == 0

    class Brighter(UViTPipeline):
        def _to_images(self, sample):
            return super()._to_images(sample) + 1

    with pytest.raises(InputError, match="got its subclass Brighter"):
        adapt(Brighter(**parts))


def test_errors_of_a_pipelines_own_code_are_one_line():
    pipeline = MAKE["sde"]()
    pipeline.unet.to(torch.bfloat16)  # its loop draws float32
    with pytest.raises(RunError, match="ScoreSdeVePipeline failed while sampling: ") as error:
        drawn(pipeline)
    assert "\n" not in str(error.value)
