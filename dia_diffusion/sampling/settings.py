"""How images are sampled, as one value that commands, records and manifests share."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from dia_diffusion.errors import InputError
from dia_diffusion.pipelines.pipeline_uvit import UViTPipeline
from dia_diffusion.sampling.generate import generate
from dia_diffusion.sampling.samplers import DEFAULT_SAMPLER, SAMPLERS, build_scheduler, check_steps


@dataclass(frozen=True)
class SamplingSettings:
    """Sampler, steps and classes; the seeds come on top."""

    sampler: str = DEFAULT_SAMPLER
    """A name of SAMPLERS."""
    steps: int = 50
    """Steps of the sampler."""
    classes: tuple[int, ...] | None = None
    """Of class-conditional models: the image of seed s has class classes[s mod their number]; None is all in turn."""
    guidance_scale: float = 1.0
    """Of classifier-free guidance; 1 is none."""

    def use(self, pipeline: UViTPipeline) -> "SamplingSettings":
        """Gives the pipeline the sampler, and returns the settings as they apply to its model.

        Raises:
            InputError: a sampler, a number of steps or classes that don't fit the pipeline.
        """
        pipeline.scheduler = build_scheduler(self.sampler, pipeline.scheduler)
        check_steps(pipeline.scheduler, self.steps)
        num_classes = pipeline.unet.num_classes
        if num_classes is None:
            if self.classes is not None or self.guidance_scale != 1.0:
                raise InputError("this model is unconditional: it takes neither classes nor a guidance scale")
            return self
        classes = tuple(range(num_classes)) if self.classes is None else self.classes
        if min(classes) < 0 or max(classes) >= num_classes:
            raise InputError(f"classes {list(classes)} out of range; accepted: 0..{num_classes - 1}")
        return SamplingSettings(self.sampler, self.steps, classes, self.guidance_scale)

    def generate(
        self,
        pipeline: UViTPipeline,
        seeds: Sequence[int],
        batch_size: int,
        progress: Callable[[float], None] | None = None,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """The images of seeds, as `generate` yields them, from a pipeline these settings are in use on."""
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the scheduler's own settings included."""
        return {**asdict(self), "classes": self.class_text(), "scheduler": SAMPLERS[self.sampler].settings}

    def class_text(self) -> str | None:
        """The classes as text, such as "0,1,2"."""
        return None if self.classes is None else ",".join(map(str, self.classes))
