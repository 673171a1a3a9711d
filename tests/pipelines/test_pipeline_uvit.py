"""UViTPipeline behaves like diffusers' own image pipelines."""

import functools
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor

from dia_diffusion import UViT, UViTPipeline
from dia_diffusion.errors import InputError
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.sampling.euler_maruyama import EulerMaruyamaScheduler

SMALL = {"sample_size": 8, "patch_size": 4, "hidden_size": 16, "num_layers": 3, "num_attention_heads": 2}


def pipeline(**kwargs: object) -> UViTPipeline:
    torch.manual_seed(0)
    pipe = UViTPipeline(
        UViT(**SMALL, **kwargs).eval(), DPMSolverMultistepScheduler(**NoiseProcess().scheduler_config())
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_output_types() -> None:
    pipe = pipeline()
    images = {
        kind: pipe(batch_size=2, generator=generators(0, 1), num_inference_steps=3, output_type=kind).images
        for kind in ("pil", "np", "pt")
    }
    assert images["pt"].shape == (2, 3, 8, 8) and images["np"].shape == (2, 8, 8, 3)
    assert images["pt"].min() >= 0 and images["pt"].max() <= 1
    assert np.allclose(images["pt"].permute(0, 2, 3, 1).numpy(), images["np"])
    assert images["pil"][0].size == (8, 8)
    assert np.abs(np.asarray(images["pil"][1]) / 255 - images["np"][1]).max() <= 0.5 / 255 + 1e-6
    gray = pipeline(in_channels=1)(num_inference_steps=2).images[0]
    assert gray.mode == "L"
    assert isinstance(pipe(num_inference_steps=2, return_dict=False), tuple)
    latents = pipe(generator=generators(0, 1), num_inference_steps=3, output_type="latent").images
    assert torch.equal((latents / 2 + 0.5).clamp(0, 1), images["pt"])
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert pipe(num_inference_steps=3, output_type="pt").images.isfinite().all()
    with pytest.raises(InputError, match="pil, np, pt"):
        pipe(output_type="jpeg")


def test_saves_and_loads_by_either_class(tmp_path: Path) -> None:
    pipe = pipeline(attention="dia-lstm-light")
    pipe.save_pretrained(tmp_path)
    expected = pipe(generator=generators(1), num_inference_steps=3, output_type="pt").images
    for loader in (UViTPipeline, DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is UViTPipeline
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(loaded(generator=generators(1), num_inference_steps=3, output_type="pt").images, expected)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_callback_sees_and_changes_every_step() -> None:
    pipe = pipeline()
    steps = []

    def callback(_: object, step: int, timestep: object, tensors: dict) -> dict:
        steps.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])}

    images = pipe(num_inference_steps=4, output_type="pt", callback_on_step_end=callback).images
    assert steps == [0, 1, 2, 3] and torch.equal(images, torch.full_like(images, 0.5))


def test_as_many_images_as_labels_generators_or_latents() -> None:
    pipe = pipeline(num_classes=3)
    for parameter in pipe.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # initial weights are so small that all classes give the same image
    arguments = {"num_inference_steps": 2, "output_type": "pt"}
    expected = pipe(batch_size=3, class_labels=[2, 0, 1], generator=generators(0, 1, 2), **arguments).images
    assert len(pipe(**arguments).images) == 1
    assert len(pipe(class_labels=[2, 0, 1], **arguments).images) == 3
    inferred = pipe(class_labels=[2, 0, 1], generator=generators(0, 1, 2), **arguments).images
    noise = torch.cat([torch.randn(1, 3, 8, 8, generator=generator) for generator in generators(0, 1, 2)])
    from_noise = pipe(class_labels=[[2], [0], [1]], latents=noise, **arguments).images
    assert torch.equal(inferred, expected) and torch.equal(from_noise, expected)
    one, same, tensor = (
        pipe(class_labels=given, generator=generators(0, 1, 2), **arguments).images
        for given in (1, [1, 1, 1], torch.tensor([1, 1, 1]))
    )
    assert torch.equal(one, same) and torch.equal(one, tensor)
    assert torch.equal(one[2], expected[2]) and not torch.equal(one[1], expected[1])


def test_callback_interrupts_after_a_step() -> None:
    pipe = pipeline()
    seen = []

    def callback(pipe: UViTPipeline, step: int, _: object, tensors: dict) -> dict:
        seen.append(tensors["latents"])
        pipe._interrupt = step == 1
        return {}

    arguments = {"generator": generators(0), "num_inference_steps": 5, "output_type": "latent"}
    latents = pipe(callback_on_step_end=callback, **arguments).images
    assert len(seen) == 2 and torch.equal(latents, seen[1]) and pipe.interrupt and pipe.num_timesteps == 5
    pipe(**arguments)
    assert not pipe.interrupt


def test_callback_changes_guidance_along_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(num_classes=3)
    batches = []
    monkeypatch.setattr(
        pipe.unet, "forward", lambda x, *args: batches.append(len(x)) or type(pipe.unet).forward(pipe.unet, x, *args)
    )
    given = []

    def cut_off(pipe: UViTPipeline, step: int, _: object, tensors: dict) -> dict:
        given.append(tensors)
        pipe._guidance_scale = 1.0 if step == 1 else pipe.guidance_scale + 1
        return tensors

    arguments = {"class_labels": [1], "guidance_scale": 2.0, "num_inference_steps": 4}
    pipe(callback_on_step_end=cut_off, callback_on_step_end_tensor_inputs=[], **arguments)
    assert batches == [2, 2, 1, 2]  # with and without the class, except in the step after guidance was cut off
    assert pipe.guidance_scale == 3 and given == [{}] * 4

    def too_low(pipe: UViTPipeline, *_: object) -> dict:
        pipe._guidance_scale = 0.5
        return {}

    with pytest.raises(InputError, match=r"must be 1 \(no guidance\) or more, got 0\.5"):
        pipe(callback_on_step_end=too_low, **arguments)


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")
def test_half_precision_by_to_by_loading_and_by_variant(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.save_pretrained(tmp_path, variant="fp16")
    loaded = UViTPipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.bfloat16)
    images = [
        each(generator=generators(0), num_inference_steps=3, output_type="pt").images
        for each in (pipe.to(torch.bfloat16), loaded)
    ]
    assert loaded.dtype == torch.bfloat16 and images[0].isfinite().all() and torch.equal(*images)


STOCHASTIC = {
    "sde-dpmsolver++": lambda config: DPMSolverMultistepScheduler(**config, algorithm_type="sde-dpmsolver++"),
    "euler-maruyama": lambda config: EulerMaruyamaScheduler(**config),
    "ddpm": lambda config: DDPMScheduler(**config, timestep_spacing="trailing"),
    "euler-ancestral": lambda config: EulerAncestralDiscreteScheduler(**config, timestep_spacing="trailing"),
    "ddim": lambda config: DDIMScheduler(**config),
}


@pytest.mark.parametrize("one_generator", [False, True], ids=["a generator an image", "one generator"])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_is_what_the_scheduler_draws_by_itself(
    name: str, one_generator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline()
    pipe.scheduler = STOCHASTIC[name](NoiseProcess().scheduler_config())
    by_loop, by_hand = [generators(0)[0], generators(0)[0]] if one_generator else [generators(0, 1), generators(0, 1)]

    scheduler = STOCHASTIC[name](NoiseProcess().scheduler_config())
    scheduler.set_timesteps(4)
    x = randn_tensor((2, 3, 8, 8), by_hand) * scheduler.init_noise_sigma
    accepts = "generator" in inspect.signature(scheduler.step).parameters
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            prediction = pipe.unet(scheduler.scale_model_input(x, timestep), timestep).sample
        x = scheduler.step(prediction, timestep, x, **({"generator": by_hand} if accepts else {})).prev_sample

    given = []
    step = pipe.scheduler.step
    monkeypatch.setattr(
        pipe.scheduler,
        "step",
        functools.wraps(step)(lambda *args, **kwargs: given.append(kwargs) or step(*args, **kwargs)),
    )
    latents = pipe(batch_size=2, generator=by_loop, num_inference_steps=4, output_type="latent").images
    assert torch.equal(latents, x)
    states = [
        torch.stack([each.get_state() for each in (which if isinstance(which, list) else [which])])
        for which in (by_loop, by_hand)
    ]
    assert torch.equal(*states)
    ready = ["variance_noise" in kwargs for kwargs in given]
    assert ready == {"euler-maruyama": [True, True, True, False]}.get(name, [name == "sde-dpmsolver++"] * 4)


@pytest.mark.parametrize(
    ("classes", "arguments", "named"),
    [
        (None, {"class_labels": 1}, "unconditional"),
        (None, {"guidance_scale": 2.0}, "unconditional"),
        (3, {"class_labels": 3}, "must be integers, 0 to 2, got 3"),
        (3, {"class_labels": [-1, 0]}, r"got \[-1, 0\]"),
        (3, {"class_labels": [0, 1, 2]}, "same number of images, got 2 from batch_size, 3 from class_labels"),
        (3, {"guidance_scale": 2.0}, "`class_labels` must be given for guidance_scale 2.0"),
        (3, {"class_labels": [2.9, 1.0]}, "must be integers, 0 to 2"),
        (3, {"class_labels": [True, False]}, "must be integers, 0 to 2"),
        (3, {"class_labels": "cat"}, "must be integers, 0 to 2, got cat"),
        (3, {"class_labels": [0, None]}, r"got \[0, None\]"),
        (3, {"class_labels": [[0, 1], [2]]}, r"got \[\[0, 1\], \[2\]\]"),
        (3, {"class_labels": 2**70}, "must be integers, 0 to 2"),
        (3, {"class_labels": 1, "guidance_scale": "2"}, r"must be 1 \(no guidance\) or more, got 2"),
        (None, {"num_inference_steps": 0}, "`num_inference_steps` must be 1 or more, got 0"),
        (None, {"num_inference_steps": -1}, "`num_inference_steps` must be 1 or more, got -1"),
        (3, {"class_labels": 1, "guidance_scale": float("nan")}, r"must be 1 \(no guidance\) or more, got nan"),
        (3, {"class_labels": 1, "guidance_scale": -2.0}, r"must be 1 \(no guidance\) or more, got -2"),
        (None, {"generator": generators(0)}, "2 from batch_size, 1 from generator"),
        (None, {"callback_on_step_end_tensor_inputs": ["prompt"]}, "latents"),
        (None, {"latents": torch.zeros(3, 3, 8, 8)}, "2 from batch_size, 3 from latents"),
        (None, {"latents": torch.zeros(2, 3, 8, 4)}, r"must have shape \(2, 3, 8, 8\), got \(2, 3, 8, 4\)"),
        (
            3,
            {"batch_size": None, "class_labels": [0, 1], "generator": generators(0)},
            "class_labels and generator must",
        ),
        (3, {"batch_size": None, "class_labels": []}, "`batch_size` must be 1 or more, got 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(classes: int | None, arguments: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        pipeline(num_classes=classes)(**{"batch_size": 2, "num_inference_steps": 2, **arguments})
