"""The distance of a pipeline's images, sampled and measured in one stream, and where its records are kept."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from dia_diffusion.evaluation.evaluate import discard_work, evaluate, work_folder
from dia_diffusion.evaluation.extras import DISTANCE_ALONE, Extras
from dia_diffusion.evaluation.feature_pass import SILENT, Reporter
from dia_diffusion.evaluation.features import FeatureExtractor
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import EvaluationRecord, Origin, Protocol, append_record, read_records
from dia_diffusion.evaluation.reference import Reference
from dia_diffusion.pipelines.folder import TRAINING_FILE, model_hash, read_training, records_file, weights_hash
from dia_diffusion.sampling.generate import ImagePipeline, generate
from dia_diffusion.sampling.samplers import SamplingSettings
from dia_diffusion.sharing.card import evaluation_rows, write_card


def image_protocol(
    extractor: FeatureExtractor,
    reference: Reference,
    num_samples: int,
    settings: SamplingSettings | None = None,
    scheduler: dict[str, Any] | None = None,
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
        scheduler=scheduler,
        num_inference_steps=None if settings is None else settings.steps,
        class_labels=None if settings is None else settings.class_text(),
        guidance_scale=None if settings is None else settings.guidance_scale,
        weights=weights,
        dtype=dtype,
    )


def pipeline_origin(folder: Path) -> Origin:
    """Where a pipeline and its weights come from, as far as its folder says."""
    training = read_training(folder)
    if training is None:
        return Origin(source=folder.name, weights_hash=weights_hash(folder), model_hash=model_hash(folder))
    recipe = training["recipe"]
    return Origin(
        source=training["run"],
        run=training["run"],
        step=training["step"],
        images_seen=training["images"],
        unit=recipe["model"]["attention"],
        batch_size=recipe["train"]["batch_size"],
        seed=recipe["seed"],
        randomness=training.get("randomness", 1),
        weights_hash=weights_hash(folder),
        model_hash=model_hash(folder),
    )


@dataclass
class PipelineDistance:
    """A way of measuring pipelines, the same for each: reference, features, number of images.

    Image k is that of seed k, whichever process draws it, so that they are the same for any number of processes.
    """

    extractor: FeatureExtractor
    reference: Reference
    num_samples: int
    batch_size: int
    accelerator: Accelerator
    extras: Extras = DISTANCE_ALONE
    reference_features: Tensor | None = None
    """(M, D), on the main process, where the extras need them."""

    def protocol(self, pipeline: ImagePipeline, folder: Path) -> Protocol:
        """The protocol of the distance."""
        dtype = str(pipeline.dtype).removeprefix("torch.")
        weights = (read_training(folder) or {}).get("weights")
        return image_protocol(
            self.extractor,
            self.reference,
            self.num_samples,
            pipeline.settings,
            pipeline.scheduler_settings,
            dtype,
            weights,
        )

    def measure(
        self,
        pipeline: ImagePipeline,
        protocol: Protocol,
        origin: Origin,
        progress: Callable[[float], None] | None = None,
        work: Path | None = None,
        reporter: Reporter = SILENT,
    ) -> EvaluationRecord:
        """Samples from a pipeline, and measures.

        protocol, origin: `protocol` and `pipeline_origin` of the pipeline and its folder.
        progress: is told how many images have been drawn.
        work, reporter: of `evaluate`.
        """

        def images(seeds: Sequence[int]) -> Iterator[Tensor]:
            for _, batch in generate(pipeline, seeds, self.batch_size, progress):
                yield batch

        return evaluate(
            images,
            self.extractor,
            self.reference.statistics,
            protocol,
            origin,
            self.accelerator,
            extras=self.extras,
            reference_features=self.reference_features,
            work=work,
            reporter=reporter,
        )


def known_record(
    file: Path, protocol: Protocol, origin: Origin, extras: Extras, named: EvalProtocol | None
) -> EvaluationRecord | None:
    """The newest record of these weights by this protocol, with all that the extras ask for; None if there is none.

    A record under the protocol's name comes before others, which have the same numbers.
    """
    asked = (protocol.hash(), origin.weights_hash, origin.model_hash)
    known = [
        record
        for record in (read_records(file) if file.is_file() else [])
        if (record.protocol_hash(), record.weights_hash, record.model_hash) == asked and record.has(extras.settings())
    ]
    under_the_name = [record for record in known if named is not None and named.named_in(record)]
    return next(reversed(under_the_name or known), None)


def keep_record(record: EvaluationRecord, file: Path, extras: Extras) -> None:
    """Appends the record and removes its work folder."""
    append_record(file, record)
    discard_work(work_folder(file, record.protocol, record, extras))


def update_card(folder: Path, file: Path) -> None:
    """Writes the records in `file` of a pipeline of a run into its model card, if they are the run's records."""
    if file != records_file(folder) or not (folder / TRAINING_FILE).is_file():
        return
    own = weights_hash(folder)
    records = (record.to_dict() for record in read_records(file) if record.weights_hash == own)
    write_card(folder, evaluation_rows(records))
