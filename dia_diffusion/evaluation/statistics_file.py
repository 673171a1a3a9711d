"""Files of statistics: this program's safetensors, and .npz files of other programs."""

import zipfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dia_diffusion.environment import __version__, installed_versions
from dia_diffusion.errors import InputError, one_line
from dia_diffusion.evaluation.features.extractor import FeatureExtractor
from dia_diffusion.evaluation.frechet import (
    SUM_BLOCK,
    FeatureStatistics,
    GivenMoments,
    Moments,
    check_moments,
)
from dia_diffusion.reading import refuse_bomb

if TYPE_CHECKING:
    from dia_diffusion.evaluation.reference import Reference

STATISTICS_VERSION = 1
"""Increase it when a code change gives other statistics for the same images and weights; older caches are ignored."""

NPZ_KEYS = "mu and sigma (as of pytorch-fid and U-ViT) or pool_3 (as of score_sde)"
MOMENTS = {"mu", "sigma", "pool_3"}
SPATIAL_MOMENTS = {"mu_s", "sigma_s"}
"""Keys in ADM's reference batches, for sFID."""

IMAGES = {"images", "arr_0"}
"""Keys of images in an .npz; ADM's reference batches have 10,000 images and statistics of the whole data set."""

TEXTS = ("source", "images_hash", "features", "features_hash")


@dataclass(frozen=True)
class StatisticsFile:
    """The contents of a file of statistics."""

    path: Path
    statistics: Moments
    provenance: dict[str, Any] | None
    """TEXTS, split (None: the source has no splits), shape (C, H, W) of the images and more; None for an npz, which has
    none of them."""
    spatial: GivenMoments | None = None
    """From an npz with mu_s and sigma_s."""

    @property
    def features(self) -> str | None:
        """The name of the features; None if the file doesn't say."""
        return None if self.provenance is None else self.provenance["features"]


def is_statistics_file(source: str | Path) -> bool:
    """Whether a reference is a file of statistics: any .safetensors, and an .npz with statistics or without images."""
    path = Path(source)
    if path.is_dir() or path.suffix not in (".safetensors", ".npz"):
        return False
    keys = _npz_keys(path)
    return bool(keys & MOMENTS) or not keys & IMAGES


def holds_images(path: str | Path) -> bool:
    """Whether a file of statistics also has images, as ADM's reference batches do."""
    return bool(_npz_keys(Path(path)) & IMAGES)


def _npz_keys(path: Path) -> set[str]:
    """The names of an .npz file's arrays; none for other files, and for damaged ones, which fail when read."""
    if path.suffix != ".npz" or not path.is_file() or not zipfile.is_zipfile(path):
        return set()
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return set()


def write_statistics(path: str | Path, reference: "Reference", extractor: FeatureExtractor) -> None:
    """Writes a safetensors file with all that `read_statistics` needs."""
    assert isinstance(reference.statistics, FeatureStatistics)
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

    Raises InputError, naming the file, if it is truncated, holds anything but finite symmetric moments, or has other
    keys (which are named).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"statistics must be a file of `dia-diffusion stats make` or an npz, got {path}: no such file")
    if path.suffix == ".npz":
        statistics, spatial = _read_npz(path)
        return StatisticsFile(path, statistics, None, spatial)
    statistics, provenance = FeatureStatistics.load(path)
    if not isinstance(provenance, dict) or not all(isinstance(provenance.get(name), str) for name in TEXTS):
        raise InputError(f"{path} doesn't say what it was made from: it needs a text for each of {', '.join(TEXTS)}")
    if not isinstance(provenance.get("split"), str | None):
        raise InputError(f"the split in {path} must be a name or none, got {provenance['split']}")
    shape = provenance.get("shape")
    if not isinstance(shape, list) or len(shape) != 3 or not all(isinstance(length, int) for length in shape):
        raise InputError(f"the shape of images in {path} must be three numbers (C, H, W), got {shape}")
    if (version := provenance.get("statistics_version")) != STATISTICS_VERSION:
        raise InputError(
            f"`statistics_version` of {path} must be {STATISTICS_VERSION}, got {version}; make it again with "
            "`dia-diffusion stats make`"
        )
    return StatisticsFile(path, statistics, provenance)


def refuse_incomparable(a: StatisticsFile, b: StatisticsFile) -> None:
    """Raises InputError for statistics of other features, weights or dimensions, as far as the files say."""
    if a.provenance is not None and b.provenance is not None:
        refuse_other_features(a, b.provenance["features"], b.provenance["features_hash"], f"{b.path} holds")
    if a.statistics.mean.shape != b.statistics.mean.shape:
        sizes = a.statistics.mean.size, b.statistics.mean.size
        raise InputError(f"{a.path} holds statistics of {sizes[0]} features, {b.path} of {sizes[1]}")


def refuse_other_features(file: StatisticsFile, features: str, weights_hash: str, where: str) -> None:
    assert file.provenance is not None
    if file.provenance["features"] != features:
        raise InputError(f"{file.path} holds statistics in features {file.provenance['features']}; {where}: {features}")
    if (own := file.provenance["features_hash"]) != weights_hash:
        raise InputError(
            f"{file.path} holds statistics in features {features} of other weights (hash {own[:12]}; {where}: "
            f"{weights_hash[:12]})"
        )


def _read_npz(path: Path) -> tuple[Moments, GivenMoments | None]:
    """The statistics of features and, from ADM's files, of spatial features."""
    try:
        with np.load(path, allow_pickle=False) as file:
            refuse_bomb(file.zip, path)
            keys = file.files
            arrays = {name: file[name] for name in sorted(MOMENTS | SPATIAL_MOMENTS) if name in keys}
            if any(isinstance(array, bytes) for array in arrays.values()):  # numpy's result if an entry isn't .npy
                raise ValueError("its entries are not arrays")
    except Exception as error:  # a damaged archive or header can raise almost anything
        raise InputError(
            f"{path} is truncated, holds objects, or is no npz of arrays ({one_line(str(error))})"
        ) from error
    for name, array in arrays.items():
        if not np.issubdtype(array.dtype, np.floating):
            raise InputError(f"{name} in {path} must be floating point numbers, got {array.dtype}")
    if {"mu", "sigma"} <= arrays.keys():
        spatial = _moments(path, arrays, "mu_s", "sigma_s") if arrays.keys() >= SPATIAL_MOMENTS else None
        return _moments(path, arrays, "mu", "sigma"), spatial
    if "pool_3" in arrays:
        return _of_features(path, arrays["pool_3"]), None
    raise InputError(f"the keys of {path} must be {NPZ_KEYS}, got {one_line(', '.join(keys)) or 'none'}")


def _moments(path: Path, arrays: dict[str, np.ndarray], mean: str, covariance: str) -> GivenMoments:
    """The moments under these keys."""
    moments = GivenMoments(arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64))
    check_moments(path, moments.mean, moments.covariance)
    values = np.linalg.eigvalsh(moments.covariance)  # ascending
    if values[0] < -1e-3 * values[-1]:
        raise InputError(
            f"{covariance} in {path} must be a covariance, with eigenvalues of 0 or more, got {values[0]:.3g} to "
            f"{values[-1]:.3g}"
        )
    return moments


def _of_features(path: Path, features: np.ndarray) -> FeatureStatistics:
    """The statistics of features (N, D), computed here."""
    if features.ndim != 2 or len(features) < 2:
        raise InputError(f"pool_3 in {path} must be (N, D) of 2 images or more, got {features.shape}")
    statistics = FeatureStatistics(features.shape[1])
    for start in range(0, len(features), SUM_BLOCK):
        statistics.update(torch.from_numpy(features[start : start + SUM_BLOCK].astype(np.float64)))
    check_moments(path, statistics.sum.numpy(), statistics.outer.numpy())
    return statistics


def sizes_text(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[2]} with {shape[0]} channel{'s' if shape[0] > 1 else ''}"
