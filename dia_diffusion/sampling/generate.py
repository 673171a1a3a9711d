"""Images by seed: image k depends on seed k alone, whatever the batch, the order and the number of processes.

A pipeline of this project or of diffusers is adapted once, with the sampling settings, which are then checked against
it. Most pipelines are sampled by UViTPipeline's loop around their network, others by their own loop.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, VQModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from dia_diffusion.errors import InputError, RunError, Stopped, first_line
from dia_diffusion.models.attached import AttachedModel
from dia_diffusion.models.registry import wrapped_networks
from dia_diffusion.pipelines.pipeline_uvit import (
    UViTPipeline,
    check_guidance,
    check_guide,
    check_null_label,
    network_prediction_type,
)
from dia_diffusion.precision import exact_float32
from dia_diffusion.progress import Advance
from dia_diffusion.sampling.load import Guide
from dia_diffusion.sampling.samplers import (
    MAX_SEED,
    OWN_SAMPLER,
    SamplingSettings,
    build_scheduler,
    check_steps,
    scheduler_settings,
)

# Pipelines with the same loop as UViTPipeline -> the component names of the network and of its latent decoder.
SHARED_LOOPS: dict[str, tuple[str, str | None]] = {
    "UViTPipeline": ("unet", None),
    "DDPMPipeline": ("unet", None),
    "DDIMPipeline": ("unet", None),
    "PNDMPipeline": ("unet", None),
    "ConsistencyModelPipeline": ("unet", None),
    "LDMPipeline": ("unet", "vqvae"),
    "DiTPipeline": ("transformer", "vae"),
}
DECODERS = (AutoencoderKL, VQModel, AutoencoderTiny)


def generate(
    pipeline: "ImagePipeline", seeds: Sequence[int], batch_size: int = 64, progress: Advance | None = None
) -> Iterator[tuple[list[int], Tensor]]:
    """Generates the images of seeds, batch by batch.

    An image's initial noise and its noise in every step come from its own generator, which is on the CPU whatever the
    device. In float32 its values differ by at most one gray level between batch sizes.

    Args:
        pipeline: from `adapt_pipeline`, with its sampling settings.
        seeds: one per image, each 0 to 2**32 - 1.
        batch_size: images per batch.
        progress: called after each network call.

    Yields:
        The seeds of the batch in the order of `seeds`, and uint8 images (B, C, H, W) on the CPU.

    Raises:
        InputError: a seed or a batch size is out of range.
        RunError: a sample is not finite.
    """
    if batch_size < 1:
        raise InputError(f"`batch_size` must be 1 or more, got {batch_size}")
    if wrong := [seed for seed in seeds if not 0 <= seed <= MAX_SEED]:
        raise InputError(f"`seeds` must be 0 to {MAX_SEED}, got {wrong[0]}")
    batches = (list(seeds[start : start + batch_size]) for start in range(0, len(seeds), batch_size))
    return ((batch, _draw(pipeline, batch, progress)) for batch in batches)


def _draw(pipeline: "ImagePipeline", seeds: list[int], progress: Advance | None) -> Tensor:
    # Else a GPU's convolutions round float32 to TF32, differently for different batch sizes.
    with exact_float32() if pipeline.dtype == torch.float32 else nullcontext():
        return _to_uint8(pipeline.draw(seeds, progress), seeds)


def _to_uint8(images: Tensor, seeds: list[int]) -> Tensor:
    if not images.isfinite().all():
        raise RunError(f"the sample of one of the seeds {seeds[0]}..{seeds[-1]} is not finite")
    return (images * 255).round().to("cpu", torch.uint8)


def adapt_pipeline(
    pipeline: DiffusionPipeline, settings: SamplingSettings, guide: Guide | None = None
) -> "ImagePipeline":
    """Prepares a pipeline for sampling with the settings. The pipeline keeps its own scheduler.

    Args:
        pipeline: this project's, or an unconditional or class-conditional one of diffusers.
        settings: sampler, steps, classes and guidance.
        guide: for autoguidance, with the settings' scale and interval.

    Raises:
        InputError: the pipeline can't be sampled, or doesn't support the sampler, number of steps, classes, guidance
            or guide.
    """
    name = type(pipeline).__name__
    if getattr(pipeline, "scheduler", None) is None:
        raise InputError(f"the pipeline must have a scheduler, got a {name} without one")
    if isinstance(pipeline, UViTPipeline) and type(pipeline) is not UViTPipeline:
        raise InputError(
            f"the pipeline must be a UViTPipeline itself, got its subclass {name}, whose changes would be lost"
        )
    if name in SHARED_LOOPS:
        return SharedLoop(pipeline, settings, guide)
    if getattr(pipeline, "unet", None) is not None:
        if guide is not None:
            raise InputError(f"`guide` must be left out for a {name}, which has its own loop")
        return OwnLoop(pipeline, settings)
    raise InputError(f"the pipeline must have a unet or be one of {', '.join(SHARED_LOOPS)}, got a {name}")


class ImagePipeline(ABC):
    """A pipeline that samples images by seed, with settings that were checked against it.

    name: the pipeline's class.
    settings: the sampling settings, with a conditional model's classes filled in.
    scheduler_settings: the settings of the scheduler in use, as plain values for records.
    image_shape: (C, H, W) of the images.
    num_classes: accepts classes 0..num_classes - 1; None is unconditional.
    has_null_label: whether it can also sample without a class, which guidance needs.
    dtype: of the network.
    guide: for autoguidance; it then replaces the null label.
    """

    def __init__(
        self,
        name: str,
        settings: SamplingSettings,
        scheduler: SchedulerMixin,
        image_shape: tuple[int, int, int],
        num_classes: int | None,
        has_null_label: bool,
        guide: Guide | None = None,
    ):
        self.name, self.image_shape, self.guide = name, image_shape, guide
        self.num_classes, self.has_null_label = num_classes, has_null_label
        if image_shape[0] not in (1, 3):
            raise InputError(f"the images of a {name} must have 1 or 3 channels, got {image_shape[0]}")
        check_steps(scheduler, settings.steps)
        if settings.classes is None and num_classes is not None:
            settings = replace(settings, classes=tuple(range(num_classes)))
        self.settings = settings
        self.scheduler_settings: dict[str, Any] = {}
        self._check_labels()

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @abstractmethod
    def draw(self, seeds: list[int], progress: Advance | None = None) -> Tensor:
        """Float images (B, C, H, W) in [0, 1], one per seed; none depends on the other seeds."""

    def to_dict(self) -> dict[str, Any]:
        """The settings, including the scheduler's, as plain values for JSON."""
        values = self.settings.to_dict(self.scheduler_settings)
        return values if self.guide is None else {**values, "guide": self.guide.hashes}

    def _check_labels(self) -> None:
        classes, scale = self.settings.classes, self.settings.guidance_scale
        check_guidance(scale, self.settings.guidance_interval, self.guide is not None)
        if self.guide is None:
            check_null_label(scale, self.num_classes, self.has_null_label)
        if self.num_classes is None:
            if classes is not None:
                raise InputError(f"`classes` must be left out for an unconditional model, got {list(classes)}")
        elif not classes or any(not 0 <= label < self.num_classes for label in classes):
            raise InputError(f"`classes` must be one or more of 0 to {self.num_classes - 1}, got {list(classes or ())}")


class SharedLoop(ImagePipeline):
    """A pipeline sampled by UViTPipeline's loop, with a generator per image and any sampler for its noise process."""

    def __init__(self, pipeline: DiffusionPipeline, settings: SamplingSettings, guide: Guide | None = None):
        name = type(pipeline).__name__
        network, decoder = _network_and_decoder(pipeline)
        latent = decoder is not None
        scheduler = build_scheduler(settings.sampler, pipeline.scheduler, latent, convert=True)
        prediction_type = network_prediction_type(pipeline)
        if latent:
            self.runner = LatentPipeline(network, scheduler, decoder, prediction_type)
        else:
            self.runner = UViTPipeline(network, scheduler, prediction_type)
        self.runner.set_progress_bar_config(disable=True)
        super().__init__(
            name,
            settings,
            scheduler,
            image_shape(name, network.in_channels, network.sample_size, decoder),
            network.num_classes,
            getattr(network, "has_null_label", True),  # a class-conditional UViT always has one
            guide,
        )
        self.guide_runner = None
        if guide is not None:
            if type(guide.pipeline).__name__ not in SHARED_LOOPS:
                accepted, got = ", ".join(SHARED_LOOPS), type(guide.pipeline).__name__
                raise InputError(f"`guide` must be one of {accepted}, got a {got}")
            network, _ = _network_and_decoder(guide.pipeline)
            theirs = guide.pipeline.scheduler
            self.guide_runner = UViTPipeline(network, theirs, network_prediction_type(guide.pipeline))
            check_guide(self.runner, self.guide_runner)
        self.scheduler_settings = scheduler_settings(settings.sampler, pipeline.scheduler, latent)

    @property
    def dtype(self) -> torch.dtype:
        return self.runner.unet.dtype

    def draw(self, seeds: list[int], progress: Advance | None = None) -> Tensor:
        def on_step_end(runner: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if progress is not None:
                progress(len(seeds) / len(runner.scheduler.timesteps))
            return tensors

        with _one_line(self.name):
            return self.runner(
                batch_size=len(seeds),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                num_inference_steps=self.settings.steps,
                class_labels=self.settings.labels(seeds),
                guidance_scale=self.settings.guidance_scale,
                output_type="pt",
                callback_on_step_end=on_step_end,
                guidance_interval=self.settings.guidance_interval,
                guide=self.guide_runner,
            )[0]


def _network_and_decoder(pipeline: DiffusionPipeline) -> tuple[Any, Any]:
    """The network of a pipeline in SHARED_LOOPS, with UViT's call signature, and the decoder of its latents, if any."""
    name = type(pipeline).__name__
    network_name, decoder_name = SHARED_LOOPS[name]
    network = getattr(pipeline, network_name)
    wrapped = tuple(row.network for row in wrapped_networks().values())
    if isinstance(network, wrapped):
        network = AttachedModel.from_backbone(network, "none")
    elif not hasattr(network, "num_classes"):  # doesn't have UViT's signature
        accepted = f"a UViT or {' or '.join(kind.__name__ for kind in wrapped)}"
        raise InputError(f"the {network_name} of a {name} must be {accepted}, got a {type(network).__name__}")
    decoder = None if decoder_name is None else getattr(pipeline, decoder_name)
    if decoder_name is not None and not isinstance(decoder, DECODERS):
        accepted = ", ".join(kind.__name__ for kind in DECODERS)
        raise InputError(f"the {decoder_name} of a {name} must be one of {accepted}, got a {type(decoder).__name__}")
    return network, decoder


class LatentPipeline(UViTPipeline):
    """UViTPipeline's loop around a latent network, with the decoder."""

    def __init__(self, unet: Any, scheduler: SchedulerMixin, vae: Any, prediction_type: str | None = None):
        super().__init__(unet, scheduler, prediction_type)
        self.register_modules(vae=vae)

    def _to_images(self, sample: Tensor) -> Tensor:
        latents = (sample / self.vae.config.scaling_factor).to(self.vae.dtype)
        return super()._to_images(self.vae.decode(latents).sample.float())


class OwnLoop(ImagePipeline):
    """A pipeline that is called image by image, with its own loop and scheduler.

    Such loops may average over a batch or draw from torch's global generator, which is therefore seeded for each image.
    """

    def __init__(self, pipeline: DiffusionPipeline, settings: SamplingSettings):
        name, config = type(pipeline).__name__, pipeline.unet.config
        self.pipeline, self.parameters = pipeline, inspect.signature(pipeline.__call__).parameters
        if settings.sampler != OWN_SAMPLER:
            raise InputError(f"`sampler` must be own for a {name}, which has its own loop, got {settings.sampler!r}")
        decoder = getattr(pipeline, "vae", getattr(pipeline, "vqvae", None))
        super().__init__(
            name,
            settings,
            pipeline.scheduler,
            image_shape(name, config.get("in_channels"), config.get("sample_size"), decoder),
            config.get("num_class_embeds") if "class_labels" in self.parameters else None,
            has_null_label=False,
        )
        self.scheduler_settings = scheduler_settings(OWN_SAMPLER, pipeline.scheduler)
        pipeline.set_progress_bar_config(disable=True)

    @property
    def dtype(self) -> torch.dtype:
        return self.pipeline.unet.dtype

    def draw(self, seeds: list[int], progress: Advance | None = None) -> Tensor:
        images, device, labels = [], self.pipeline.device, self.settings.labels(seeds)
        for index, seed in enumerate(seeds):
            given = {
                "batch_size": 1,
                "generator": torch.Generator().manual_seed(seed),
                "num_inference_steps": self.settings.steps,
                "class_labels": None if labels is None else [labels[index]],
                "output_type": "np",
            }
            known = {name: value for name, value in given.items() if name in self.parameters and value is not None}
            with _one_line(self.name), torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                output = self.pipeline(**known)[0]  # (1, H, W, C), in [0, 1]
            image = torch.from_numpy(np.asarray(output)).permute(0, 3, 1, 2)
            if tuple(image.shape[1:]) != self.image_shape:
                raise RunError(f"the images of a {self.name} must be {self.image_shape}, got {tuple(image.shape[1:])}")
            images.append(image)
            if progress is not None:
                progress(1)
        return torch.cat(images)


def image_shape(name: str, channels: Any, sample_size: Any, decoder: Any = None) -> tuple[int, int, int]:
    """(C, H, W) of a pipeline's images: the shape of its network's samples, or of their decoded images.

    Raises InputError: the network doesn't declare its size.
    """
    pair = [sample_size, sample_size] if isinstance(sample_size, int) else sample_size
    if not isinstance(channels, int) or not isinstance(pair, list | tuple) or len(pair) != 2:
        raise InputError(
            f"the network of a {name} must have in_channels, and as sample_size one number or height and width, got "
            f"in_channels {channels} and sample_size {sample_size}"
        )
    height, width = pair
    if decoder is None:
        return channels, height, width
    factor = 2 ** (len(decoder.config.block_out_channels) - 1)  # each block but the last doubles the size
    return decoder.config.out_channels, factor * height, factor * width


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Converts exceptions of third-party code to a one-line RunError that has them as its cause."""
    try:
        yield
    except (InputError, RunError, Stopped):
        raise
    except Exception as error:
        raise RunError(f"{name} failed while sampling: {first_line(error)}") from error
