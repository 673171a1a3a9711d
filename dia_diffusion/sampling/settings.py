"""How images are sampled, as one value that commands, records and manifests share."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dia_diffusion.sampling.samplers import DEFAULT_SAMPLER, check_steps

if TYPE_CHECKING:
    from torch import Tensor

    from dia_diffusion.sampling.image_pipeline import ImagePipeline

PRECISIONS = ("float32", "bfloat16", "float16")
"""Of the network while sampling, by torch's names."""


@dataclass(frozen=True)
class SamplingSettings:
    """Sampler, steps and classes; the seeds come on top."""

    sampler: str = DEFAULT_SAMPLER
    """A name of SAMPLER_NAMES."""
    steps: int = 50
    """Steps of the sampler."""
    classes: tuple[int, ...] | None = None
    """Of class-conditional models: the image of seed s has class classes[s mod their number]; None is all in turn."""
    guidance_scale: float = 1.0
    """Of classifier-free guidance; 1 is none."""

    def use(self, pipeline: "ImagePipeline") -> "SamplingSettings":
        """Gives the pipeline the sampler, and returns the settings as they apply to its model.

        Raises:
            InputError: a sampler, a number of steps or classes that don't fit the pipeline.
        """
        pipeline.use_sampler(self.sampler)
        check_steps(pipeline.scheduler, self.steps)
        classes = self.classes
        if classes is None and pipeline.num_classes is not None:
            classes = tuple(range(pipeline.num_classes))
        pipeline.check_labels(classes, self.guidance_scale)
        return SamplingSettings(self.sampler, self.steps, classes, self.guidance_scale)

    def generate(
        self,
        pipeline: "ImagePipeline",
        seeds: Sequence[int],
        batch_size: int,
        progress: Callable[[float], None] | None = None,
    ) -> Iterator[tuple[list[int], "Tensor"]]:
        """The images of seeds, as `generate` yields them, from a pipeline these settings are in use on."""
        from dia_diffusion.sampling.generate import generate

        labels = None if self.classes is None else [self.classes[seed % len(self.classes)] for seed in seeds]
        return generate(
            pipeline,
            seeds,
            batch_size=batch_size,
            num_inference_steps=self.steps,
            class_labels=labels,
            guidance_scale=self.guidance_scale,
            progress=progress,
        )

    def grid_columns(self, seeds: Sequence[int]) -> int | None:
        """How many columns of a grid of these seeds make each show one class; None where none do, or without classes.

        One column a class, or several where the grid would else be much higher than wide.
        """
        num_classes = len(self.classes or ())
        if not 0 < num_classes <= len(seeds):
            return None
        if any((seed - seeds[0] - index) % num_classes for index, seed in enumerate(seeds)):
            return None
        return num_classes * max(1, round(math.sqrt(len(seeds)) / num_classes))

    def to_dict(self, pipeline: "ImagePipeline") -> dict[str, Any]:
        """Plain values for JSON, the scheduler's own settings included."""
        return {**asdict(self), "classes": self.class_text(), "scheduler": pipeline.sampler_settings()}

    def class_text(self) -> str | None:
        """The classes as text, such as "0,1,2"."""
        return None if self.classes is None else ",".join(map(str, self.classes))
