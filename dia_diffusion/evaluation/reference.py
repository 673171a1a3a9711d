"""Reference images: their statistics and features, cached on disk, and files of statistics."""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from dia_diffusion.data import ImageSet
from dia_diffusion.environment import __version__, installed_versions
from dia_diffusion.errors import InputError, one_line
from dia_diffusion.evaluation.feature_store import SILENT, Reporter, batches_of, fill, open_on_main, widths_of
from dia_diffusion.evaluation.features import FeatureExtractor
from dia_diffusion.evaluation.frechet import (
    SUM_BLOCK,
    FeatureStatistics,
    GivenMoments,
    check_moments,
    frechet_distance,
    measure,
    sums,
)
from dia_diffusion.io import cache_folder, sha256_of_file
from dia_diffusion.reading import refuse_bomb

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
            statistics = sums(features.split(SUM_BLOCK), extractor.num_features)
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


NPZ_KEYS = "mu and sigma (as of pytorch-fid and U-ViT) or pool_3 (as of score_sde)"
MOMENTS = {"mu", "sigma", "pool_3"}
IMAGES = {"images", "arr_0"}
"""The keys of an .npz of images, which ADM writes beside moments at times."""
TEXTS = ("source", "images_hash", "features", "features_hash")


@dataclass(frozen=True)
class StatisticsFile:
    """What a file of statistics holds."""

    path: Path
    statistics: FeatureStatistics | GivenMoments
    provenance: dict[str, Any] | None
    """TEXTS, split (None: the source has no parts), shape (C, H, W) of the images and more; None for an npz, which says
    nothing of them."""

    @property
    def features(self) -> str | None:
        """The name of the features, None where the file doesn't say."""
        return None if self.provenance is None else self.provenance["features"]


def is_statistics_file(source: str | Path) -> bool:
    """Whether a source of reference images is a file of statistics instead: any .safetensors, and an .npz of none."""
    path = Path(source)
    if path.is_dir() or path.suffix not in (".safetensors", ".npz"):
        return False
    if path.suffix == ".safetensors" or not path.is_file() or not zipfile.is_zipfile(path):
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            keys = {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return True  # which reading it will tell
    return bool(keys & MOMENTS) or not keys & IMAGES


def write_statistics(path: str | Path, reference: Reference, extractor: FeatureExtractor) -> None:
    """One safetensors file with all that `read_statistics` and a reader need. Raises InputError for other suffixes."""
    if Path(path).suffix != ".safetensors":
        raise InputError(f"the file for statistics must end in .safetensors, got {path}")
    if not isinstance(reference.statistics, FeatureStatistics):
        raise InputError(f"{reference.name} gives a mean and a covariance only, of unknown images")
    provenance = {
        "source": reference.name,
        "split": reference.split,
        "shape": reference.shape,
        "count": reference.statistics.count,
        "images_hash": reference.hash,
        "features": extractor.name,
        "features_hash": extractor.weights_hash,
        "statistics_version": STATISTICS_VERSION,
        "created_by": f"dia-diffusion {__version__}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": installed_versions(),
    }
    reference.statistics.save(path, provenance)


def read_statistics(path: str | Path) -> StatisticsFile:
    """A file that `write_statistics` wrote, or another program's npz; nothing in either is executed.

    Raises InputError, naming the file, for one that is truncated, holds other things than finite symmetric moments, or
    has other keys (which are named).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is no file here; accepted: statistics by `dia-diffusion stats make`, or an npz")
    if path.suffix == ".npz":
        return StatisticsFile(path, _read_npz(path), None)
    statistics, provenance = FeatureStatistics.load(path)
    if not isinstance(provenance, dict) or not all(isinstance(provenance.get(name), str) for name in TEXTS):
        raise InputError(f"{path} doesn't say what it was made of, which takes texts for {', '.join(TEXTS)}")
    if not isinstance(provenance.get("split"), str | None):
        raise InputError(f"{path} says its images are the part {provenance['split']}; accepted: a name, or none")
    shape = provenance.get("shape")
    if not isinstance(shape, list) or len(shape) != 3 or not all(isinstance(length, int) for length in shape):
        raise InputError(f"{path} says its images have the shape {shape}; accepted: three numbers (C, H, W)")
    if (version := provenance.get("statistics_version")) != STATISTICS_VERSION:
        raise InputError(f"{path} is of version {version}, this program's are {STATISTICS_VERSION}; make it again")
    return StatisticsFile(path, statistics, provenance)


def open_reference(path: str | Path, extractor: FeatureExtractor, shape: tuple[int, int, int]) -> Reference:
    """A file of statistics as the reference for images of `shape` (C, H, W) in an extractor's features.

    Raises InputError for statistics of other features, other weights, other dimensions, or images of another shape.
    """
    file = read_statistics(path)
    if file.provenance is not None:
        _refuse_other_features(file, extractor.name, extractor.weights_hash, "measured")
        made_of = tuple(file.provenance["shape"])
        if made_of != shape:
            raise InputError(
                f"{path} was made of images of {_sizes(made_of)}, measured are images of {_sizes(shape)}; "
                f"`dia-diffusion stats make SOURCE OUT --size {shape[1]} --channels {shape[0]}` reduces them alike"
            )
    if (found := file.statistics.mean.size) != extractor.num_features:
        raise InputError(f"{path} holds statistics of {found} features; {extractor.name} has {extractor.num_features}")
    if file.provenance is None:
        return Reference(file.path.name, None, None, sha256_of_file(path), file.statistics)
    known = file.provenance
    return Reference(known["source"], known["split"], made_of, known["images_hash"], file.statistics)


def refuse_incomparable(a: StatisticsFile, b: StatisticsFile) -> None:
    """Raises InputError for statistics of other features, weights or dimensions, as far as the files say."""
    if a.provenance is not None and b.provenance is not None:
        _refuse_other_features(a, b.provenance["features"], b.provenance["features_hash"], f"{b.path} holds")
    if a.statistics.mean.shape != b.statistics.mean.shape:
        sizes = a.statistics.mean.size, b.statistics.mean.size
        raise InputError(f"{a.path} holds statistics of {sizes[0]} features, {b.path} of {sizes[1]}")


def _refuse_other_features(file: StatisticsFile, features: str, weights_hash: str, where: str) -> None:
    assert file.provenance is not None
    if file.provenance["features"] != features:
        raise InputError(f"{file.path} holds statistics in features {file.provenance['features']}; {where}: {features}")
    if (own := file.provenance["features_hash"]) != weights_hash:
        raise InputError(
            f"{file.path} holds statistics in features {features} of other weights (hash {own[:12]}; {where}: "
            f"{weights_hash[:12]})"
        )


def _read_npz(path: Path) -> FeatureStatistics | GivenMoments:
    try:
        with np.load(path, allow_pickle=False) as file:
            refuse_bomb(file.zip, path)
            keys = file.files
            arrays = {name: file[name] for name in sorted(MOMENTS) if name in keys}
            if any(isinstance(array, bytes) for array in arrays.values()):  # as numpy gives what is in no .npy format
                raise ValueError("its entries are no arrays")
    except Exception as error:  # a damaged archive or header can raise almost anything
        raise InputError(
            f"{path} is truncated, holds objects, or is no npz of arrays ({one_line(str(error))})"
        ) from error
    for name, array in arrays.items():
        if not np.issubdtype(array.dtype, np.floating):
            raise InputError(f"{path}: {name} is of type {array.dtype}; accepted: floating point numbers")
    if {"mu", "sigma"} <= arrays.keys():
        moments = GivenMoments(arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64))
        check_moments(path, moments.mean, moments.covariance)
        values = np.linalg.eigvalsh(moments.covariance)  # ascending
        if values[0] < -1e-3 * values[-1]:
            raise InputError(
                f"{path} holds a sigma that is no covariance: its eigenvalues go from {values[0]:.3g} to "
                f"{values[-1]:.3g}; accepted: none below zero"
            )
        return moments
    if "pool_3" in arrays:
        return _of_features(path, arrays["pool_3"])
    raise InputError(f"{path} has the keys {one_line(', '.join(keys)) or 'of nothing'}; accepted: {NPZ_KEYS}")


def _of_features(path: Path, features: np.ndarray, block: int = 4096) -> FeatureStatistics:
    """The statistics of the features (N, D) themselves."""
    if features.ndim != 2 or len(features) < 2:
        raise InputError(f"{path}: pool_3 has the shape {features.shape}; accepted: (N, D) of 2 images or more")
    statistics = FeatureStatistics(features.shape[1])
    for start in range(0, len(features), block):
        statistics.update(torch.from_numpy(features[start : start + block].astype(np.float64)))
    check_moments(path, statistics.sum.numpy(), statistics.outer.numpy())
    return statistics


def _sizes(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[2]} with {shape[0]} channel{'s' if shape[0] > 1 else ''}"


def reference_features(
    images: ImageSet,
    extractor: FeatureExtractor,
    accelerator: Accelerator,
    progress: Callable[[float], None] | None = None,
    reporter: Reporter = SILENT,
) -> torch.Tensor | None:
    """The features (N, D) of the images, a memory map of a file in the cache; None where this isn't the main process.

    All processes share the work where it isn't in the cache, and it goes on where it was stopped. A cache that can't be
    written is done without.
    """
    depends = [images.fingerprint, extractor.name, extractor.weights_hash, STATISTICS_VERSION]
    folder = cache_folder() / "features" / hashlib.sha256(json.dumps(depends).encode()).hexdigest()
    widths = widths_of(extractor, logits=False)
    with open_on_main(accelerator, folder, widths, len(images), cache=True) as file:
        fill(file, len(images), batches_of(images, progress), extractor, accelerator, widths, images.name, reporter)
        return None if file is None else file.read("features")
