"""From images to a recorded distance, and what else is asked for, from one pass, on one process or several."""

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dia_diffusion.distributed import broadcast_from_rank_zero
from dia_diffusion.environment import installed_versions
from dia_diffusion.evaluation.feature_store import (
    SILENT,
    FeatureFile,
    ImagesOf,
    Reporter,
    fill,
    open_on_main,
    widths_of,
)
from dia_diffusion.evaluation.features import FeatureExtractor
from dia_diffusion.evaluation.frechet import (
    SUM_BLOCK,
    Moments,
    bootstrap_interval,
    frechet_distance,
    sums,
)
from dia_diffusion.evaluation.metrics import DISTANCE_ALONE, Extras, compute_metrics
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import (
    EvaluationRecord,
    Origin,
    ResolvedProtocol,
    append_record,
    make_record,
    read_records,
)
from dia_diffusion.evaluation.reference import Reference
from dia_diffusion.pipelines.folder import TRAINING_FILE, model_hash, read_training, records_file, weights_hash
from dia_diffusion.sampling.generate import ImagePipeline, generate
from dia_diffusion.sampling.samplers import SamplingSettings
from dia_diffusion.sharing.card import evaluation_rows, write_card


def evaluate(
    images: ImagesOf,
    extractor: FeatureExtractor,
    reference: Moments,
    protocol: ResolvedProtocol,
    origin: Origin,
    accelerator: Accelerator,
    *,
    extras: Extras = DISTANCE_ALONE,
    reference_features: torch.Tensor | None = None,
    work: Path | None = None,
    reporter: Reporter = SILENT,
) -> EvaluationRecord:
    """Measures images 0, 1, ... against the reference, as the protocol says; every process gets the record.

    Images are made and measured chunk by chunk; only features are kept, on disk, so memory doesn't grow with their
    number, and float64 sums over them give the distance.

    Args:
        images: gives the images of the indices it is called with.
        accelerator: whose processes share the images.
        extras: what to compute beside the distance.
        reference_features: (M, D), for extras that need them; the main process's count.
        work: the folder that finished chunks are kept in, see `work_folder`. The same call goes on from what a killed
            one left there, and the caller discards it once the record is written. None: a temporary one.
        reporter: is told how it goes.

    Raises:
        InputError: too few images, or no logits, for what is asked for.
        RunError: another process is writing to `work`.

    Warns where a covariance is singular.
    """
    start = time.monotonic()
    extras.check_samples(protocol.num_samples)
    widths = widths_of(extractor, extras.logits)
    with open_on_main(accelerator, work, widths, protocol.num_samples) as file:
        earlier = broadcast_from_rank_zero(accelerator, lambda: file.seconds if file else 0.0)
        fill(file, protocol.num_samples, images, extractor, accelerator, widths, origin.source, reporter)
        compute = partial(_numbers, file, extractor, reference, reference_features, extras, reporter)
        numbers = broadcast_from_rank_zero(accelerator, compute)
    for text in few_images(protocol, extractor.num_features):
        warnings.warn(text, FewImagesWarning, stacklevel=2)
    seconds = earlier + time.monotonic() - start
    return make_record(protocol=protocol, origin=origin, seconds=seconds, metric_settings=extras.settings(), **numbers)


def work_folder(records: Path, protocol: ResolvedProtocol, origin: Origin, extras: Extras) -> Path:
    """Where the chunks of an evaluation lie until it is in the file `records`: a folder beside it.

    Named for a hash of all that the features depend on, so that no other evaluation goes on with them.
    """
    depends = [protocol.hash(), origin.weights_hash, origin.model_hash, extras.logits, installed_versions()]
    key = hashlib.sha256(json.dumps(depends).encode()).hexdigest()
    return unfinished_folder(records) / key[:16]


def unfinished_folder(records: Path) -> Path:
    """The folder of all evaluations that were begun and aren't in the file `records` yet."""
    return records.parent / f"{records.stem}.unfinished"


def discard_work(folder: Path) -> None:
    """Removes a work folder, where there is one."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # another evaluation's is beside it
        folder.parent.rmdir()


class FewImagesWarning(UserWarning):
    """There are no more images than features."""


def few_images(protocol: ResolvedProtocol, num_features: int) -> list[str]:
    """What covariances of no more images than features do to a distance, in words; empty where there are enough."""
    counts = {"samples": protocol.num_samples, "reference images": protocol.reference_count}
    return [
        f"{count} {what} for {num_features} features: their covariance is singular and the distance comes out too "
        f"large, the more so the fewer there are; compare it only with distances of as many"
        for what, count in counts.items()
        if count is not None and count <= num_features
    ]


def _numbers(
    file: FeatureFile | None,
    extractor: FeatureExtractor,
    reference: Moments,
    reference_features: torch.Tensor | None,
    extras: Extras,
    reporter: Reporter,
) -> dict[str, Any]:
    """The numbers of a record, from the finished file."""
    assert file is not None
    features = file.read("features")
    distance = frechet_distance(sums(features.split(SUM_BLOCK), extractor.num_features), reference)
    found: dict[str, Any] = {"distance": distance}
    logits = file.read("logits") if extras.logits else None
    found["metrics"] = compute_metrics(
        extras, extractor.name, features, logits, reference_features, extractor.device, reporter.computing
    )
    if extras.bootstrap:
        progress = partial(reporter.computing, "bootstrap")
        interval = bootstrap_interval(features, reference, distance, extras.bootstrap, progress)
        found |= {"low": interval.low, "high": interval.high, "standard_error": interval.standard_error}
    return found


def image_protocol(
    extractor: FeatureExtractor,
    reference: Reference,
    num_samples: int,
    settings: SamplingSettings | None = None,
    scheduler: dict[str, Any] | None = None,
    dtype: str | None = None,
    weights: str | None = None,
) -> ResolvedProtocol:
    """The protocol of `num_samples` images against a reference; with settings, of the images of seeds 0, 1, 2, ..."""
    return ResolvedProtocol(
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

    def protocol(self, pipeline: ImagePipeline, folder: Path) -> ResolvedProtocol:
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
        protocol: ResolvedProtocol,
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
    file: Path, protocol: ResolvedProtocol, origin: Origin, extras: Extras, named: EvalProtocol | None
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
