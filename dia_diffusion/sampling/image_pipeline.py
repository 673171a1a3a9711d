"""Others' networks in UViTPipeline's loop: DDPMPipeline's and its like, in pixels; DiTPipeline's, in latents."""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
    VQModel,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from dia_diffusion.errors import InputError, RunError, Stopped, first_line
from dia_diffusion.models.uvit import UViTOutput
from dia_diffusion.pipelines.pipeline_uvit import UViTPipeline
from dia_diffusion.sampling.samplers import OWN_SAMPLER, build_scheduler, check_sampler_name, scheduler_settings

# Pipelines whose own loop is UViTPipeline's: the names of their network, and of the decoder of its latents.
LOOPED_PIPELINES: dict[str, tuple[str, str | None]] = {
    "UViTPipeline": ("unet", None),
    "DDPMPipeline": ("unet", None),
    "DDIMPipeline": ("unet", None),
    "PNDMPipeline": ("unet", None),
    "ConsistencyModelPipeline": ("unet", None),
    "LDMPipeline": ("unet", "vqvae"),
    "DiTPipeline": ("transformer", "vae"),
}
DECODERS = (AutoencoderKL, VQModel, AutoencoderTiny)


class Backbone(nn.Module):
    """A UNet2DModel or DiT as UViTPipeline calls it, the null label of a DiT being its number of classes."""

    def __init__(self, network: UNet2DModel | DiTTransformer2DModel):
        super().__init__()
        self.network = network
        self.in_channels: int = network.config.in_channels
        self.sample_size = network.config.sample_size
        self.has_null_label = isinstance(network, DiTTransformer2DModel)
        self.num_classes: int | None = network.config.get(
            "num_embeds_ada_norm" if self.has_null_label else "num_class_embeds"
        )

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> UViTOutput:
        """sample (B, C, H, W) -> (B, C, H, W), or (B, 2 C, H, W) where the network predicts a variance too."""
        timesteps = timestep.to(sample.device).expand(len(sample))
        if class_labels is None and self.has_null_label and self.num_classes is not None:
            class_labels = torch.full((len(sample),), self.num_classes, device=sample.device)
        return UViTOutput(sample=self.network(sample, timesteps, class_labels=class_labels).sample)


class BackbonePipeline(UViTPipeline):
    """UViTPipeline's loop around a Backbone, with the decoder of its latents where it has one."""

    def __init__(self, unet: Any, scheduler: SchedulerMixin, vae: Any = None):
        super().__init__(unet=unet, scheduler=scheduler)
        self.register_modules(vae=vae)

    def _predict(self, sample: Tensor, timestep: Tensor, labels: Tensor | None, guidance_scale: float) -> Tensor:
        prediction = super()._predict(sample, timestep, labels, guidance_scale)
        # Of all schedulers, only DDPM's goes by a predicted variance.
        takes_variance = isinstance(self.scheduler, DDPMScheduler) and self.scheduler.config.variance_type in (
            "learned",
            "learned_range",
        )
        return prediction if takes_variance else prediction[:, : self.unet.in_channels]

    def _to_images(self, sample: Tensor) -> Tensor:
        if self.vae is not None:
            sample = self.vae.decode((sample / self.vae.config.scaling_factor).to(self.vae.dtype)).sample.float()
        return super()._to_images(sample)


def looped_pipeline(pipeline: DiffusionPipeline) -> UViTPipeline:
    """UViTPipeline's loop around the parts of a pipeline of LOOPED_PIPELINES, with a copy of its scheduler.

    Raises:
        InputError: a network or a decoder of another kind, or a network that takes other than class numbers.
    """
    name = type(pipeline).__name__
    network_name, decoder_name = LOOPED_PIPELINES[name]
    network = getattr(pipeline, network_name)
    if isinstance(network, UNet2DModel | DiTTransformer2DModel):
        if embedding := network.config.get("class_embed_type"):
            raise InputError(f"the model of this {name} takes a {embedding} as its label; accepted: classes by number")
        network = Backbone(network)
    elif not hasattr(network, "num_classes"):  # neither a UViT nor what is called alike
        accepted = "UNet2DModel, DiTTransformer2DModel or UViT"
        raise InputError(f"the {network_name} of this {name} is a {type(network).__name__}; accepted: {accepted}")
    decoder = None if decoder_name is None else getattr(pipeline, decoder_name)
    if decoder_name is not None and not isinstance(decoder, DECODERS):
        accepted = ", ".join(kind.__name__ for kind in DECODERS)
        raise InputError(f"the {decoder_name} of this {name} is a {type(decoder).__name__}; accepted: {accepted}")
    return BackbonePipeline(network, copy.deepcopy(pipeline.scheduler), decoder)


Progress = Callable[[float], None]
"""Called with a number of images, in fractions, that have been drawn since the last call."""


class ImagePipeline(ABC):
    """A pipeline that draws images from noise, unconditionally or by class.

    name: the pipeline's class.
    image_shape: (C, H, W) of its images.
    num_classes: the classes it takes, 0..num_classes - 1; None is unconditional.
    has_null_label: whether it can draw without a class too, which guidance needs.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int | None
    has_null_label: bool

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the network."""

    @property
    @abstractmethod
    def scheduler(self) -> SchedulerMixin:
        """The one in use."""

    @abstractmethod
    def use_sampler(self, name: str) -> None:
        """Takes a sampler by name, `own` being the scheduler that came with the pipeline.

        Raises:
            InputError: an unknown name, or a sampler that can't follow the pipeline's noise process.
        """

    @abstractmethod
    def sampler_settings(self) -> dict[str, Any]:
        """What a record says of the sampler in use: the settings of its scheduler, as plain values."""

    @abstractmethod
    def draw(
        self,
        seeds: Sequence[int],
        num_inference_steps: int,
        class_labels: Sequence[int] | None = None,
        guidance_scale: float = 1.0,
        progress: Progress | None = None,
    ) -> Tensor:
        """Float images (B, C, H, W) in [0, 1], one a seed, each the same whatever the other seeds."""

    def check_labels(self, class_labels: Sequence[int] | None, guidance_scale: float) -> None:
        """Raises InputError where labels or a guidance scale don't fit the model."""
        if self.num_classes is None:
            if class_labels is not None or guidance_scale != 1.0:
                raise InputError("this model is unconditional: it takes neither classes nor a guidance scale")
            return
        if not 1 <= guidance_scale < float("inf"):
            raise InputError(f"guidance scale {guidance_scale}; accepted: 1, which is none, or more")
        if guidance_scale != 1.0 and not self.has_null_label:
            raise InputError(
                f"the model of this {self.name} has no null label to guide with; accepted: guidance scale 1"
            )
        accepted = f"0..{self.num_classes - 1}"
        if class_labels is None:
            if not self.has_null_label or guidance_scale != 1.0:
                raise InputError(f"this {self.name} draws by class and was given none; accepted: {accepted}")
        elif any(not 0 <= label < self.num_classes for label in class_labels):
            raise InputError(f"classes {list(class_labels)} out of range; accepted: {accepted}")


class LoopedPipeline(ImagePipeline):
    """One that UViTPipeline's loop samples, with a generator an image and every sampler of its noise process."""

    def __init__(self, name: str, runner: UViTPipeline):
        self.name, self.runner, self.own_scheduler = name, runner, runner.scheduler
        self.sampler = OWN_SAMPLER
        self.runner.set_progress_bar_config(disable=True)
        vae = getattr(runner, "vae", None)
        self.image_shape = image_shape(name, runner.unet.in_channels, runner.unet.sample_size, vae)
        self.num_classes = runner.unet.num_classes
        self.has_null_label = getattr(runner.unet, "has_null_label", True)  # a UViT by class always has one
        self.latent = vae is not None

    @property
    def dtype(self) -> torch.dtype:
        return self.runner.unet.dtype

    @property
    def scheduler(self) -> SchedulerMixin:
        return self.runner.scheduler

    def use_sampler(self, name: str) -> None:
        self.runner.scheduler = build_scheduler(name, self.own_scheduler, self.latent)
        self.sampler = name

    def sampler_settings(self) -> dict[str, Any]:
        return scheduler_settings(self.sampler, self.own_scheduler, self.latent)

    def draw(
        self,
        seeds: Sequence[int],
        num_inference_steps: int,
        class_labels: Sequence[int] | None = None,
        guidance_scale: float = 1.0,
        progress: Progress | None = None,
    ) -> Tensor:
        with _one_line(self.name):
            return self.runner(
                batch_size=len(seeds),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                num_inference_steps=num_inference_steps,
                class_labels=None if class_labels is None else list(class_labels),
                guidance_scale=guidance_scale,
                output_type="pt",
                callback_on_step_end=_report(progress, len(seeds)),
            )[0]


class CalledPipeline(ImagePipeline):
    """One that is called image by image, with a loop and a scheduler of its own.

    Such loops may take averages over a batch or draw from torch's global generator, which is seeded for each image.
    """

    has_null_label = False

    def __init__(self, pipeline: DiffusionPipeline):
        self.name, self.pipeline = type(pipeline).__name__, pipeline
        self.parameters = inspect.signature(pipeline.__call__).parameters
        config = pipeline.unet.config
        decoder = getattr(pipeline, "vae", getattr(pipeline, "vqvae", None))
        self.image_shape = image_shape(self.name, config.get("in_channels"), config.get("sample_size"), decoder)
        self.num_classes = config.get("num_class_embeds") if "class_labels" in self.parameters else None
        pipeline.set_progress_bar_config(disable=True)

    @property
    def dtype(self) -> torch.dtype:
        return self.pipeline.unet.dtype

    @property
    def scheduler(self) -> SchedulerMixin:
        return self.pipeline.scheduler

    def use_sampler(self, name: str) -> None:
        check_sampler_name(name)
        if name != OWN_SAMPLER:
            raise InputError(f"{self.name} has a loop of its own, which sampler {name} can't replace; accepted: own")

    def sampler_settings(self) -> dict[str, Any]:
        return scheduler_settings(OWN_SAMPLER, self.scheduler)

    def draw(
        self,
        seeds: Sequence[int],
        num_inference_steps: int,
        class_labels: Sequence[int] | None = None,
        guidance_scale: float = 1.0,
        progress: Progress | None = None,
    ) -> Tensor:
        images, device = [], self.pipeline.device
        for index, seed in enumerate(seeds):
            given = {
                "batch_size": 1,
                "generator": torch.Generator().manual_seed(seed),
                "num_inference_steps": num_inference_steps,
                "class_labels": None if class_labels is None else [class_labels[index]],
                "output_type": "np",
            }
            known = {name: value for name, value in given.items() if name in self.parameters and value is not None}
            with _one_line(self.name), torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                output = self.pipeline(**known)[0]  # (1, H, W, C), in [0, 1]
            image = torch.from_numpy(np.asarray(output)).permute(0, 3, 1, 2)
            if tuple(image.shape[1:]) != self.image_shape:
                raise RunError(f"{self.name} drew {tuple(image.shape[1:])}, where its model says {self.image_shape}")
            images.append(image)
            if progress is not None:
                progress(1)
        return torch.cat(images)


def adapt_pipeline(pipeline: DiffusionPipeline | ImagePipeline) -> ImagePipeline:
    """A pipeline of diffusers or of this project as an ImagePipeline around the same model.

    Raises:
        InputError: a pipeline that can't be sampled that way.
    """
    if isinstance(pipeline, ImagePipeline):
        return pipeline
    name = type(pipeline).__name__
    if getattr(pipeline, "scheduler", None) is None:
        raise InputError(f"this {name} has no scheduler, which its images are drawn by")
    adapted: ImagePipeline
    if isinstance(pipeline, UViTPipeline) and type(pipeline) is not UViTPipeline:
        raise InputError(f"{name} is a UViTPipeline with changes, which would be lost; accepted: UViTPipeline itself")
    if name in LOOPED_PIPELINES:
        adapted = LoopedPipeline(name, looped_pipeline(pipeline))
    elif getattr(pipeline, "unet", None) is not None:
        adapted = CalledPipeline(pipeline)
    else:
        raise InputError(f"{name} has no unet; accepted: {', '.join(LOOPED_PIPELINES)} and their like")
    if adapted.image_shape[0] not in (1, 3):
        raise InputError(f"{name} draws images of {adapted.image_shape[0]} channels; accepted: 1 or 3")
    return adapted


def image_shape(name: str, channels: Any, sample_size: Any, decoder: Any = None) -> tuple[int, int, int]:
    """(C, H, W) of a pipeline's images: those of its network's samples, or what its decoder makes of them.

    Raises:
        InputError: a network that doesn't say its size.
    """
    pair = [sample_size, sample_size] if isinstance(sample_size, int) else sample_size
    if not isinstance(channels, int) or not isinstance(pair, list | tuple) or len(pair) != 2:
        accepted = "one number, or height and width"
        raise InputError(
            f"the model of this {name} has in_channels {channels} and sample_size {sample_size}; accepted: {accepted}"
        )
    height, width = pair
    if decoder is None:
        return channels, height, width
    factor = 2 ** (len(decoder.config.block_out_channels) - 1)  # each block but the last doubles the size
    return decoder.config.out_channels, factor * height, factor * width


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Makes what others' code raises a RunError of one line, with the whole as its cause."""
    try:
        yield
    except (InputError, RunError, Stopped):
        raise
    except Exception as error:
        raise RunError(f"{name} failed while sampling: {first_line(error)}") from error


def _report(progress: Progress | None, num_images: int) -> Callable[..., dict[str, Any]] | None:
    if progress is None:
        return None

    def on_step_end(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        progress(num_images / len(pipeline.scheduler.timesteps))
        return tensors

    return on_step_end
