"""Images by seed: image k depends on seed k alone, whatever the batch, the order and the number of processes."""

from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dia_diffusion.errors import InputError, RunError
from dia_diffusion.sampling.image_pipeline import ImagePipeline, adapt_pipeline
from dia_diffusion.sampling.samplers import check_steps
from dia_diffusion.sampling.settings import MAX_SEED


def generate(
    pipeline: DiffusionPipeline | ImagePipeline,
    seeds: Sequence[int],
    *,
    batch_size: int,
    num_inference_steps: int,
    class_labels: int | Sequence[int] | None = None,
    guidance_scale: float = 1.0,
    progress: Callable[[float], None] | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Generates the images of seeds, batch by batch.

    An image's first noise and its noise in every step come from a generator of its own, on the CPU on any device. In
    float32 it is the same to one grey level however it is batched.

    Args:
        pipeline: this project's or an unconditional or class-conditional one of diffusers, with the scheduler to use.
        seeds: one per image, each 0 to 2**32 - 1.
        batch_size: images at a time.
        num_inference_steps: steps of the scheduler.
        class_labels: a class for all images, or one a seed, or None.
        guidance_scale: of classifier-free guidance; 1 is none.
        progress: called after each network call with the number of images, in fractions, that it amounts to.

    Yields:
        Seeds of the batch in the order of `seeds`, and uint8 images (B, C, H, W) on the CPU.

    Raises:
        InputError: seeds, numbers of steps, images or labels that can't be.
        RunError: a sample that is not finite.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; accepted: 1 or more")
    if wrong := [seed for seed in seeds if not 0 <= seed <= MAX_SEED]:
        raise InputError(f"seeds must be 0 to {MAX_SEED}, got {wrong[0]}")
    labels = None
    if class_labels is not None:
        labels = [class_labels] * len(seeds) if isinstance(class_labels, int) else list(class_labels)
    if labels is not None and len(labels) != len(seeds):
        raise InputError(f"{len(labels)} class_labels for {len(seeds)} seeds; accepted: one, or one a seed")
    adapted = adapt_pipeline(pipeline)
    check_steps(adapted.scheduler, num_inference_steps)
    adapted.check_labels(labels, guidance_scale)
    return _batches(adapted, list(seeds), batch_size, num_inference_steps, labels, guidance_scale, progress)


def _batches(
    pipeline: ImagePipeline,
    seeds: list[int],
    batch_size: int,
    num_inference_steps: int,
    labels: list[int] | None,
    guidance_scale: float,
    progress: Callable[[float], None] | None,
) -> Iterator[tuple[list[int], Tensor]]:
    for start in range(0, len(seeds), batch_size):
        batch = seeds[start : start + batch_size]
        batch_labels = None if labels is None else labels[start : start + batch_size]
        images = pipeline.draw(batch, num_inference_steps, batch_labels, guidance_scale, progress)
        if not images.isfinite().all():
            raise RunError(f"the sample of one of the seeds {batch[0]}..{batch[-1]} is not finite")
        yield batch, (images * 255).round().to("cpu", torch.uint8)
