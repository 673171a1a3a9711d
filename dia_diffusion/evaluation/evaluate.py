"""From a stream of images to a recorded distance, on one process or several."""

import time
import warnings
from collections.abc import Iterable

import torch

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import FeatureExtractor
from dia_diffusion.evaluation.frechet import Moments, frechet_distance
from dia_diffusion.evaluation.record import EvaluationRecord, Origin, Protocol, make_record
from dia_diffusion.evaluation.statistics import FeatureStatistics


def measure(images: Iterable[torch.Tensor], extractor: FeatureExtractor) -> FeatureStatistics:
    """The statistics of uint8 batches (B, C, H, W), each forgotten once it is measured."""
    statistics = FeatureStatistics(extractor.num_features)
    for batch in images:
        statistics.update(extractor(batch))
    return statistics


def evaluate(
    images: Iterable[torch.Tensor], extractor: FeatureExtractor, reference: Moments, protocol: Protocol, origin: Origin
) -> EvaluationRecord:
    """Measures the images against the reference, as the protocol says.

    Under torch.distributed every process brings its own share of the images, and each gets the record of the whole.
    Warns where a covariance is singular; raises InputError when the images aren't `protocol.num_samples`.
    """
    start = time.monotonic()
    statistics = measure(images, extractor)
    statistics.reduce()
    if statistics.count != protocol.num_samples:
        raise InputError(f"{protocol.num_samples} images asked for, {origin.source} gave {statistics.count}")
    for text in few_images(protocol, extractor.num_features):
        warnings.warn(text, FewImagesWarning, stacklevel=2)
    return make_record(frechet_distance(statistics, reference), protocol, origin, time.monotonic() - start)


class FewImagesWarning(UserWarning):
    """There are no more images than features."""


def few_images(protocol: Protocol, num_features: int) -> list[str]:
    """What covariances of no more images than features do to a distance, in words; empty where there are enough."""
    counts = {"samples": protocol.num_samples, "reference images": protocol.reference_count}
    return [
        f"{count} {what} for {num_features} features: their covariance is singular and the distance comes out too "
        f"large, the more so the fewer there are; compare it only with distances of as many"
        for what, count in counts.items()
        if count <= num_features
    ]
