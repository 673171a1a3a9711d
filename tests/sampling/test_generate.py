import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from dia_diffusion.distributed import shard
from dia_diffusion.errors import RunError
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.sampling.generate import adapt_pipeline, generate
from dia_diffusion.sampling.samplers import OWN_SAMPLER, SAMPLERS, SamplingSettings, build_scheduler


def adapted(pipeline, steps=7, sampler=OWN_SAMPLER, **settings):
    return adapt_pipeline(pipeline, SamplingSettings(sampler, steps, **settings))


def images_of(pipeline, seeds, batch_size=2, progress=None, **settings):
    """{seed: uint8 image (C, H, W)}"""
    images = {}
    for batch, pixels in generate(adapted(pipeline, **settings), seeds, batch_size, progress):
        assert pixels.dtype == torch.uint8
        images.update(zip(batch, pixels, strict=True))
    assert list(images) == list(seeds)
    return images


def largest_difference(images, others):
    return max(int((images[seed].int() - others[seed].int()).abs().max()) for seed in images)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_belongs_to_its_seed(name, tiny_pipeline):
    pipeline = tiny_pipeline()
    seeds = [0, 1, 2, 3, 2**31 + 7]
    whole = images_of(pipeline, seeds, sampler=name, batch_size=5)
    assert torch.stack(list(whole.values())).float().std() > 20
    assert largest_difference({0: whole[0]}, {0: whole[1]}) > 20
    assert largest_difference(whole, images_of(pipeline, seeds[::-1], sampler=name, batch_size=2)) <= 1
    shares = [images_of(pipeline, shard(seeds, rank, 3), sampler=name, batch_size=4) for rank in range(3)]
    assert largest_difference(whole, shares[0] | shares[1] | shares[2]) <= 1


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, "ieee"), (torch.bfloat16, "tf32")])
def test_float32_convolutions_are_not_rounded_to_tf32(dtype, rounding, tiny_pipeline):
    """Which cuDNN does by default, and for some batch sizes only."""
    pipeline, seen = tiny_pipeline().to(dtype), set()
    pipeline.unet.register_forward_hook(lambda *_: seen.add(torch.backends.cudnn.conv.fp32_precision))
    before = torch.backends.cudnn.conv.fp32_precision
    images_of(pipeline, [0], steps=1)
    assert seen == {rounding} and torch.backends.cudnn.conv.fp32_precision == before


@pytest.mark.parametrize("name", ["euler-maruyama", "dpmsolver++"])
def test_batches_from_1_to_64_draw_the_same_in_float64(name, tiny_pipeline):
    pipeline = tiny_pipeline().to(torch.float64)
    pipeline.scheduler = build_scheduler(name, pipeline.scheduler)

    def drawn(size):
        parts = []
        for start in range(0, 64, size):
            generators = [torch.Generator().manual_seed(seed) for seed in range(start, start + size)]
            options = {"num_inference_steps": 3, "output_type": "pt"}
            parts.append(pipeline(batch_size=size, generator=generators, **options).images)
        return torch.cat(parts)

    whole = drawn(64)
    assert whole.dtype == torch.float64 and whole.std() > 0.1
    for size in (1, 16):
        torch.testing.assert_close(drawn(size), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", ["ddpm-linear", "cosine"])
@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"euler-maruyama"}))
def test_discrete_processes_too(name, schedule, tiny_pipeline):
    # The last timestep of the cosine process spans several of the steps that are evenly spaced in log-SNR.
    pipeline = tiny_pipeline()
    process = NoiseProcess(schedule=schedule, prediction_type="sample")
    pipeline.scheduler = DDPMScheduler(**process.scheduler_config())
    images = images_of(pipeline, [0, 1], sampler=name)
    assert torch.stack(list(images.values())).float().std() > 20


def test_equals_the_pipeline_itself_and_leaves_it_as_it_is(tiny_pipeline):
    pipeline = tiny_pipeline()
    before = set(pipeline.scheduler.__dict__)
    ours = images_of(pipeline, [3, 4])
    assert set(pipeline.scheduler.__dict__) == before and pipeline.scheduler.num_inference_steps is None
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    theirs = pipeline(batch_size=2, generator=generators, num_inference_steps=7).images
    for image, seed in zip(theirs, (3, 4), strict=True):
        assert np.array_equal(np.asarray(image.convert("RGB")), ours[seed].permute(1, 2, 0))


def test_labels_go_with_their_seeds(tiny_pipeline):
    pipeline = tiny_pipeline(num_classes=4)
    torch.nn.init.normal_(pipeline.unet.label_embed.weight, std=3.0)
    labelled = images_of(pipeline, [0, 1, 2], classes=(3, 0, 2), batch_size=2)
    for seed, label in ((0, 3), (1, 0), (2, 2)):
        assert largest_difference({seed: labelled[seed]}, images_of(pipeline, [seed], classes=(label,))) <= 1
    assert largest_difference({0: labelled[0]}, images_of(pipeline, [0], classes=(1,))) > 1
    assert largest_difference({0: labelled[0]}, images_of(pipeline, [0], classes=(3,), guidance_scale=3.0)) > 1
    assert adapted(pipeline).settings.classes == (0, 1, 2, 3)


@pytest.mark.parametrize("name", ["dpmsolver++", "heun"])
def test_progress_adds_up_to_the_images(name, tiny_pipeline):
    pipeline = tiny_pipeline()
    pipeline.scheduler = build_scheduler(name, pipeline.scheduler)
    done = []
    images_of(pipeline, range(5), progress=done.append)
    assert sum(done) == pytest.approx(5)
    assert len(done) == 3 * (7 if name == "dpmsolver++" else 13)


def test_non_finite_samples_raise(tiny_pipeline):
    pipeline = tiny_pipeline()
    torch.nn.init.constant_(pipeline.unet.decoder.weight, float("nan"))
    with pytest.raises(RunError, match=r"seeds 4\.\.5"):
        list(generate(adapted(pipeline, steps=2), [4, 5]))
