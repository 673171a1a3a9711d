"""UViTPipeline behaves as diffusers' own image pipelines do."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from dia_diffusion import UViT, UViTPipeline
from dia_diffusion.errors import InputError
from dia_diffusion.noise import NoiseProcess

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
    grey = pipeline(in_channels=1)(num_inference_steps=2).images[0]
    assert grey.mode == "L"
    assert isinstance(pipe(num_inference_steps=2, return_dict=False), tuple)
    with pytest.raises(InputError, match="pil, np, pt"):
        pipe(output_type="jpeg")


def test_an_image_belongs_to_its_generator() -> None:
    pipe = pipeline()
    whole = pipe(batch_size=3, generator=generators(5, 6, 7), num_inference_steps=4, output_type="pt").images
    alone = pipe(batch_size=1, generator=generators(6), num_inference_steps=4, output_type="pt").images
    assert (whole[1] - alone[0]).abs().max() < 1e-5


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


def test_loads_in_a_new_interpreter_after_import_alone(tmp_path: Path) -> None:
    pipeline().save_pretrained(tmp_path)
    code = (
        "import sys, dia_diffusion; from diffusers import DiffusionPipeline;"
        "print(type(DiffusionPipeline.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "UViTPipeline", done.stderr


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_schedulers_swap_in_by_from_config(scheduler: type) -> None:
    pipe = pipeline()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    assert pipe(num_inference_steps=3, output_type="pt").images.isfinite().all()


def test_callback_sees_and_changes_every_step() -> None:
    pipe = pipeline()
    steps = []

    def callback(_: object, step: int, timestep: object, tensors: dict) -> dict:
        steps.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])}

    images = pipe(num_inference_steps=4, output_type="pt", callback_on_step_end=callback).images
    assert steps == [0, 1, 2, 3] and torch.equal(images, torch.full_like(images, 0.5))


def test_guidance_is_the_published_combination() -> None:
    pipe = pipeline(num_classes=3)
    for parameter in pipe.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # the first weights are so small that all classes give one image
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 2])
    guided = pipe._predict(x, torch.tensor(500), labels, 3.0)
    unconditional, conditional = pipe.unet(x, 500).sample, pipe.unet(x, 500, labels).sample
    assert torch.allclose(guided, unconditional + 3 * (conditional - unconditional), atol=1e-5)
    arguments = {"batch_size": 2, "num_inference_steps": 2, "output_type": "pt"}
    images = [
        pipe(class_labels=given, generator=generators(0, 1), **arguments).images
        for given in (1, [1, 1], torch.tensor([1, 1]), [1, 2])
    ]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert not torch.equal(images[0][1], images[3][1])


def test_bfloat16_pipeline_samples() -> None:
    pipe = pipeline().to(torch.bfloat16)
    assert pipe(num_inference_steps=3, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize(
    ("classes", "arguments", "named"),
    [
        (None, {"class_labels": 1}, "unconditional"),
        (None, {"guidance_scale": 2.0}, "unconditional"),
        (3, {"class_labels": 3}, r"out of range; accepted: 0\.\.2"),
        (3, {"class_labels": [-1, 0]}, "out of range"),
        (3, {"class_labels": [0, 1, 2]}, "3 class_labels for 2 images"),
        (3, {"guidance_scale": 2.0}, "needs class_labels"),
        (3, {"class_labels": [2.9, 1.0]}, "no whole numbers"),
        (3, {"class_labels": 1, "guidance_scale": float("nan")}, "guidance_scale nan; accepted: 1"),
        (3, {"class_labels": 1, "guidance_scale": -2.0}, "accepted: 1, which is none, or more"),
        (None, {"generator": generators(0)}, "1 generators for 2 images"),
        (None, {"callback_on_step_end_tensor_inputs": ["prompt"]}, "latents"),
    ],
)
def test_labels_that_do_not_fit_are_named(classes: int | None, arguments: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        pipeline(num_classes=classes)(batch_size=2, num_inference_steps=2, **arguments)
