"""The distance of a pipeline's images: sampled and measured in one stream, nothing kept but sums."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from dia_diffusion.evaluation.evaluate import evaluate
from dia_diffusion.evaluation.features import FeatureExtractor
from dia_diffusion.evaluation.record import EvaluationRecord, Origin, Protocol
from dia_diffusion.evaluation.reference import Reference
from dia_diffusion.pipelines.card import read_training
from dia_diffusion.pipelines.pipeline_uvit import UViTPipeline
from dia_diffusion.sampling.load import weights_hash
from dia_diffusion.sampling.samplers import SAMPLERS
from dia_diffusion.sampling.seeds import my_share
from dia_diffusion.sampling.settings import SamplingSettings


def image_protocol(
    extractor: FeatureExtractor,
    reference: Reference,
    num_samples: int,
    settings: SamplingSettings | None = None,
    dtype: str | None = None,
    weights: str | None = None,
) -> Protocol:
    """The protocol of `num_samples` images against a reference; with settings, of the images of seeds 0, 1, 2, ..."""
    return Protocol(
        features=extractor.name,
        features_hash=extractor.weights_hash,
        reference=reference.name,
        reference_split=reference.split,
        reference_shape=reference.shape,
        reference_count=reference.statistics.count,
        reference_hash=reference.hash,
        num_samples=num_samples,
        seeds=None if settings is None else f"0-{num_samples - 1}",
        sampler=None if settings is None else settings.sampler,
        scheduler=None if settings is None else SAMPLERS[settings.sampler].settings,
        num_inference_steps=None if settings is None else settings.steps,
        class_labels=None if settings is None else settings.class_text(),
        guidance_scale=None if settings is None else settings.guidance_scale,
        weights=weights,
        dtype=dtype,
    )


def pipeline_origin(folder: Path) -> Origin:
    """Where a pipeline's weights come from, as far as its folder says."""
    training = read_training(folder)
    if training is None:
        return Origin(source=folder.name, weights_hash=weights_hash(folder))
    recipe = training["recipe"]
    return Origin(
        source=training["run"],
        run=training["run"],
        step=training["step"],
        images_seen=training["images"],
        unit=recipe["model"]["attention"],
        batch_size=recipe["train"]["batch_size"],
        seed=recipe["seed"],
        weights_hash=weights_hash(folder),
    )


@dataclass
class PipelineDistance:
    """A way of measuring pipelines, the same for each: reference, features, sampler, number of images.

    The image of seed k is measured by process k mod N, so that the images are the same for any number of processes.
    """

    extractor: FeatureExtractor
    reference: Reference
    settings: SamplingSettings
    num_samples: int
    batch_size: int
    accelerator: Accelerator

    def protocol(self, pipeline: UViTPipeline, folder: Path) -> Protocol:
        """The protocol of a pipeline's distance."""
        dtype = str(pipeline.unet.dtype).removeprefix("torch.")
        weights = (read_training(folder) or {}).get("weights")
        return image_protocol(self.extractor, self.reference, self.num_samples, self.settings, dtype, weights)

    def measure(
        self, pipeline: UViTPipeline, folder: Path, progress: Callable[[float], None] | None = None
    ) -> EvaluationRecord:
        """Samples from a pipeline that the settings are in use on, and measures."""
        seeds = my_share(range(self.num_samples), self.accelerator.process_index, self.accelerator.num_processes)

        def images() -> Iterator[Tensor]:
            for _, batch in self.settings.generate(pipeline, seeds, self.batch_size, progress):
                yield batch

        protocol = self.protocol(pipeline, folder)
        return evaluate(images(), self.extractor, self.reference.statistics, protocol, pipeline_origin(folder))
