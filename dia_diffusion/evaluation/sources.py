"""Images to measure: drawn by a pipeline from seeds, or existing ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dia_diffusion.data import ImageSet
from dia_diffusion.evaluation.feature_store import BATCH, Advance, ImagesOf, batches_of
from dia_diffusion.evaluation.record import Origin
from dia_diffusion.pipelines.folder import average_of, model_hash, read_training, weights_hash
from dia_diffusion.sampling.generate import ImagePipeline, generate


@dataclass(frozen=True)
class MeasuredImages:
    """Images to measure."""

    name: str
    origin: Origin
    count: int
    images: ImagesOf
    """Image k is the same in every process."""
    sampled_by: dict[str, Any]
    """Fields of ResolvedProtocol: how the images are sampled."""
    folder: Path | None = None
    """Folder of the pipeline that draws the images."""


def pipeline_source(pipeline: ImagePipeline, folder: Path, count: int, batch_size: int = BATCH) -> MeasuredImages:
    """The images that a pipeline draws from the seeds 0 to count - 1."""

    def images(seeds: Sequence[int], advance: Advance) -> Iterator[Tensor]:
        for _, batch in generate(pipeline, seeds, batch_size, advance):
            yield batch

    settings = pipeline.settings
    sampled_by = {
        "seeds": f"0-{count - 1}",
        "sampler": settings.sampler,
        "scheduler": pipeline.scheduler_settings,
        "num_inference_steps": settings.steps,
        "class_labels": settings.class_text(),
        "guidance_scale": settings.guidance_scale,
        "weights": (read_training(folder) or {}).get("weights"),
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "guidance_interval": None if settings.guidance_interval is None else list(settings.guidance_interval),
        "guide": None if pipeline.guide is None else pipeline.guide.hashes,
    }
    return MeasuredImages(folder.name, pipeline_origin(folder), count, images, sampled_by, folder)


def images_source(images: ImageSet) -> MeasuredImages:
    """Existing images."""
    origin = Origin(source=images.name, split=images.split, weights_hash=images.fingerprint)
    return MeasuredImages(images.name, origin, len(images), batches_of(images), {})


def pipeline_origin(folder: Path) -> Origin:
    """Where a pipeline and its weights come from, as far as its folder says."""
    training = read_training(folder)
    hashes: dict[str, Any] = {"weights_hash": weights_hash(folder), "model_hash": model_hash(folder)}
    if training is None:
        return Origin(source=folder.name, **hashes)
    recipe = training["recipe"]
    return Origin(
        source=f"{training['run']}, {name}" if (name := average_of(training)) else training["run"],
        run=training["run"],
        step=training["step"],
        images_seen=training["images"],
        unit=recipe["model"]["attention"],
        batch_size=recipe["train"]["batch_size"],
        seed=recipe["seed"],
        randomness=training.get("randomness", 1),
        **hashes,
    )
