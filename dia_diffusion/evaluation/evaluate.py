"""From images to a recorded distance, and what else is asked for, from one pass, on one process or several."""

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dia_diffusion.distributed import broadcast_from_rank_zero
from dia_diffusion.environment import installed_versions
from dia_diffusion.evaluation.bootstrap import bootstrap_interval
from dia_diffusion.evaluation.extras import DISTANCE_ALONE, Extras
from dia_diffusion.evaluation.feature_file import FeatureFile
from dia_diffusion.evaluation.feature_pass import SILENT, ImagesOf, Reporter, fill, open_on_main, widths_of
from dia_diffusion.evaluation.features import FeatureExtractor
from dia_diffusion.evaluation.frechet import Moments, frechet_distance
from dia_diffusion.evaluation.metrics import compute_metrics
from dia_diffusion.evaluation.record import EvaluationRecord, Origin, Protocol, make_record
from dia_diffusion.evaluation.statistics import FeatureStatistics

BLOCK = 4096  # rows of features summed at once


def measure(images: Iterable[torch.Tensor], extractor: FeatureExtractor) -> FeatureStatistics:
    """The statistics of uint8 batches (B, C, H, W), each forgotten once it is measured."""
    return sums((extractor(batch) for batch in images), extractor.num_features)


def sums(blocks: Iterable[torch.Tensor], num_features: int) -> FeatureStatistics:
    """The statistics of features in blocks (B, num_features)."""
    statistics = FeatureStatistics(num_features)
    for rows in blocks:
        statistics.update(rows)
    return statistics


def evaluate(
    images: ImagesOf,
    extractor: FeatureExtractor,
    reference: Moments,
    protocol: Protocol,
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


def work_folder(records: Path, protocol: Protocol, origin: Origin, extras: Extras) -> Path:
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


def few_images(protocol: Protocol, num_features: int) -> list[str]:
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
    distance = frechet_distance(sums(features.split(BLOCK), extractor.num_features), reference)
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
