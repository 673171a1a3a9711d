"""Which images: lists of seeds, and each process's share of them."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from dia_diffusion.errors import InputError, one_line
from dia_diffusion.sampling.samplers import DEFAULT_SAMPLER, check_steps

if TYPE_CHECKING:
    from torch import Tensor

    from dia_diffusion.sampling.image_pipeline import ImagePipeline


MAX_SEEDS = 10_000_000
MAX_SEED = 2**32 - 1  # torch's CPU generator ignores higher bits: 7 and 7 + 2**32 would draw the same image

T = TypeVar("T")


def parse_seeds(text: str) -> list[int]:
    """Seeds from text such as "0-63,100,7", in that order.

    Raises:
        InputError: no such list, a seed of 2**32 or more, one named twice, or more than ten million seeds.
    """
    seeds: list[int] = []
    shown = one_line(text)
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,19})(?:-(\d{1,19}))?", part.strip(), flags=re.ASCII)
        if match is None:
            raise InputError(
                f"seeds {shown!r}: {one_line(part)!r} is neither a seed nor a range; accepted: such as 0-63,100,7"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last > MAX_SEED:
            raise InputError(f"seeds must be 0 to {MAX_SEED}, got {one_line(part)!r}")
        if last < first:
            raise InputError(f"a range of seeds must go upwards, got {one_line(part)!r}")
        if len(seeds) + last - first >= MAX_SEEDS:
            raise InputError(f"seeds {shown!r} are more than the {MAX_SEEDS} that are accepted")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) < len(seeds):
        raise InputError(f"seeds {shown!r} name a seed twice; accepted: each seed once")
    return seeds


def shard(items: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """What process `rank` of `world_size` does: every world_size-th item; the shares differ by one item at most."""
    return items[rank::world_size]


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
