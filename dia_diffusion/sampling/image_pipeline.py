"""Any pipeline as sampling, commands and records see it: what images it draws, and how to draw some by their seeds."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from dia_diffusion.errors import InputError, RunError, Stopped, first_line
from dia_diffusion.pipelines.pipeline_uvit import UViTPipeline
from dia_diffusion.sampling.backbone import LOOPED_PIPELINES, looped_pipeline
from dia_diffusion.sampling.samplers import OWN_SAMPLER, build_scheduler, check_sampler_name, scheduler_settings

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
