"""Statistics of real images, cached under a hash of everything they come from."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

from dia_diffusion.data import ImageSet
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.evaluate import BLOCK, measure, sums
from dia_diffusion.evaluation.features import FeatureExtractor
from dia_diffusion.evaluation.frechet import frechet_distance
from dia_diffusion.evaluation.statistics import FeatureStatistics, GivenMoments
from dia_diffusion.io import cache_folder

STATISTICS_VERSION = 1
"""To be raised when a change of code gives the same images and weights other statistics: it unlearns older caches."""


@dataclass(frozen=True)
class Reference:
    """Real images as a distance sees them. None: a file of statistics that doesn't say it."""

    name: str
    split: str | None
    shape: tuple[int, int, int] | None
    """(C, H, W)"""
    hash: str
    """Of the very images chosen, whatever the features; of the file, where it doesn't say which images they were."""
    statistics: FeatureStatistics | GivenMoments


def reference_statistics(
    images: ImageSet,
    extractor: FeatureExtractor,
    *,
    count: int | None = None,
    seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    features: torch.Tensor | None = None,
) -> Reference:
    """The statistics of all of `images`, of the first `count`, or of `count` chosen by `seed`; cached on disk.

    progress: called with (images measured, of how many), where they aren't in the cache.
    features: of the very images (N, D), where they are known.
    Where several processes share the cache, let the first go ahead (Accelerate's `main_process_first`).
    Raises InputError when there are fewer than `count` images, or fewer than 2.
    """
    indices = choose(len(images), count, seed)
    if len(indices) < 2:
        raise InputError(f"{images.name}: a covariance of 1 image; accepted: 2 or more")
    channels, height, width = images.shape
    image_hash = hash_of_images(images, indices)
    provenance: dict[str, object] = {
        "source": images.name,
        "split": images.split,
        "shape": [channels, height, width],
        "images_hash": image_hash,
        "features": extractor.name,
        "features_hash": extractor.weights_hash,
        "statistics_version": STATISTICS_VERSION,
    }
    path = cache_folder() / "statistics" / f"{_hash(provenance)}.safetensors"
    try:
        statistics, _ = FeatureStatistics.load(path)
    except InputError:  # not there yet, or truncated
        if features is None:
            statistics = measure(_batches(images, indices, progress), extractor)
        else:
            statistics = sums(features.split(BLOCK), extractor.num_features)
        with suppress(OSError):  # a cache that can't be written is done without
            statistics.save(path, provenance)
    return Reference(images.name, images.split, (channels, height, width), image_hash, statistics)


def hash_of_images(images: ImageSet, indices: np.ndarray) -> str:
    """The hash of a reference made of the images at these int64 indices."""
    return _hash({"fingerprint": images.fingerprint, "indices": hashlib.sha256(indices.tobytes()).hexdigest()})


def floor_distance(
    reference: Reference, images: ImageSet, extractor: FeatureExtractor, *, count: int, seed: int = 0
) -> float:
    """The line a perfect model would reach: the distance of `count` other real images, chosen by `seed`."""
    others = reference_statistics(images, extractor, count=count, seed=seed)
    return frechet_distance(others.statistics, reference.statistics)


def choose(total: int, count: int | None = None, seed: int | None = None) -> np.ndarray:
    """Ascending int64 indices below `total`: all, the first `count`, or `count` chosen by `seed` without repetition."""
    if count is None:
        return np.arange(total)
    if not 0 < count <= total:
        raise InputError(f"{count} images asked for; the source has {total}")
    return np.arange(count) if seed is None else np.sort(np.random.default_rng(seed).permutation(total)[:count])


def _batches(
    images: ImageSet, indices: np.ndarray, progress: Callable[[int, int], None] | None, size: int = 64
) -> Iterator[torch.Tensor]:
    for start in range(0, len(indices), size):
        yield torch.from_numpy(images.read(indices[start : start + size]))
        if progress is not None:  # the caller has measured the batch when it asks for the next
            progress(min(start + size, len(indices)), len(indices))


def _hash(values: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
