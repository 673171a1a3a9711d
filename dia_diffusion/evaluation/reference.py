"""Reference images: their statistics and features, cached on disk, and files of statistics."""

import hashlib
import json
import zipfile
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from dia_diffusion.data import ImageSet
from dia_diffusion.data.arrays import numpy_archive
from dia_diffusion.data.sources import open_images_on_ranks
from dia_diffusion.distributed import first_on_each_machine, on_all_ranks
from dia_diffusion.environment import __version__, installed_versions
from dia_diffusion.errors import InputError, one_line
from dia_diffusion.evaluation.feature_store import batches_of, filled_store
from dia_diffusion.evaluation.features.extractor import FeatureExtractor
from dia_diffusion.evaluation.frechet import (
    SUM_BLOCK,
    FeatureStatistics,
    GivenMoments,
    check_moments,
    frechet_distance,
    sums,
)
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.io import cache_folder, sha256_of_file
from dia_diffusion.progress import Progress
from dia_diffusion.reading import refuse_bomb

OTHER_SPLIT = {"train": "test", "test": "train"}
STATISTICS_VERSION = 1
"""To be raised when a change of code gives the same images and weights other statistics; older caches are ignored."""


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
    features: torch.Tensor | None = None
    """(M, D), on rank 0 and only if a metric needs them."""
    spatial: FeatureStatistics | GivenMoments | None = None
    """The statistics of the extractor's spatial features, if a metric needs them or a file has them."""
    beside_statistics: int | None = None
    """How many images `features` are of, where a file has these beside statistics of other images."""


@dataclass(frozen=True)
class HeldOut:
    """Real images outside the reference, which metric fdr compares with."""

    name: str
    split: str | None
    hash: str
    count: int
    features: torch.Tensor | None
    """(count, D), on rank 0."""


def measure_held_out(
    reference: Reference,
    data: str,
    shape: tuple[int, int, int],
    extractor: FeatureExtractor,
    protocol: EvalProtocol,
    accelerator: Accelerator,
    progress: Progress,
) -> HeldOut | None:
    """The protocol's held-out images, else the other split of the reference's `data`; None if no metric needs them.

    shape: (C, H, W) that they are reduced to, as the reference is.

    Raises InputError if there is no other split, or the held-out images are the reference.
    """
    if not protocol.needs("held-out features"):
        return None
    source, split = protocol.held_out or data, "train"
    if protocol.held_out is None:
        if reference.split is None or is_statistics_file(data):
            why = "holds statistics" if is_statistics_file(data) else "has no other split"
            raise InputError(f"`--held-out` must be given for metric fdr: the reference {data} {why}")
        split = OTHER_SPLIT[reference.split]
    options = {"split": split, "size": shape[1], "channels": shape[0]}
    images = open_images_on_ranks(source, accelerator, progress, **options)
    image_hash = hash_of_images(images, np.arange(len(images)))
    if image_hash == reference.hash:
        raise InputError(f"`--held-out` must be other images than the reference, got {source}")
    features = reference_features(images, extractor, accelerator, progress)
    return HeldOut(images.name, images.split, image_hash, len(images), features)


def measure_reference(
    images: ImageSet,
    extractor: FeatureExtractor,
    protocol: EvalProtocol,
    accelerator: Accelerator,
    progress: Progress,
) -> Reference:
    """The reference that the images are for a protocol, on all ranks.

    Raises:
        InputError: another number of images than the protocol says, or too few for a metric.
    """
    check_reference_count(protocol, images.name, len(images))
    protocol.check_count(len(images), reference=True)
    features = None
    if protocol.needs("reference features"):
        features = reference_features(images, extractor, accelerator, progress)
    spatial = protocol.needs("spatial")
    compute = partial(reference_statistics, images, extractor, features=features, spatial=spatial)
    return replace(first_on_each_machine(accelerator, compute), features=features)


def check_reference_count(protocol: EvalProtocol, name: str, count: int | None) -> None:
    """Raises InputError unless a reference has as many images as the protocol says, if it does."""
    if protocol.reference_count not in (None, count):
        got = "an unknown number" if count is None else f"{count:,}"
        raise InputError(
            f"the reference must have {protocol.reference_count:,} images for protocol {protocol.name}, got {got} in "
            f"{name}"
        )


def reference_statistics(
    images: ImageSet,
    extractor: FeatureExtractor,
    *,
    count: int | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
    features: torch.Tensor | None = None,
    spatial: bool = False,
) -> Reference:
    """The statistics of all of `images`, of the first `count`, or of `count` chosen by `seed`; cached on disk.

    Args:
        progress: shows the images that are measured.
        features: of the very images (N, D), if they are known.
        spatial: also those of the spatial features, which the extractor must have; from the same pass.

    Raises:
        InputError: fewer than `count` images, or fewer than 2.
    """
    indices = choose(len(images), count, seed)
    if len(indices) < 2:
        raise InputError(f"{images.name} must have 2 images or more, got {len(indices)}")
    image_hash = hash_of_images(images, indices)
    provenance: dict[str, object] = {
        "source": images.name,
        "split": images.split,
        "shape": list(images.shape),
        "images_hash": image_hash,
        "features": extractor.name,
        "features_hash": extractor.weights_hash,
        "statistics_version": STATISTICS_VERSION,
    }
    described = {"features": provenance}
    if spatial:
        described["spatial"] = provenance | {"layer": "spatial"}
    paths = {layer: cache_folder() / "statistics" / f"{_hash(text)}.safetensors" for layer, text in described.items()}
    known: dict[str, FeatureStatistics] = {}
    for layer, path in paths.items():
        with suppress(InputError):  # not there yet, or truncated
            known[layer], _ = FeatureStatistics.load(path)
    made: dict[str, FeatureStatistics] = {}
    if features is not None and "features" not in known:
        made["features"] = sums(features.split(SUM_BLOCK), extractor.num_features)
    if missing := paths.keys() - known.keys() - made.keys():
        made |= _measure_layers(_batches(images, indices, progress), extractor, missing)
    for layer, statistics in made.items():
        with suppress(OSError):  # a cache that can't be written is done without
            statistics.save(paths[layer], described[layer])
    known |= made
    return Reference(
        images.name, images.split, images.shape, image_hash, known["features"], spatial=known.get("spatial")
    )


def _measure_layers(
    batches: Iterator[torch.Tensor], extractor: FeatureExtractor, names: Collection[str]
) -> dict[str, FeatureStatistics]:
    """The statistics of some layers of the images, from one pass."""
    statistics = {name: FeatureStatistics(extractor.widths[name]) for name in names}
    for batch in batches:
        layers = extractor.layers(batch)
        for name in names:
            statistics[name].update(layers[name])
    return statistics


def _batches(images: ImageSet, indices: np.ndarray, progress: Progress | None) -> Iterator[torch.Tensor]:
    done = 0

    def advance(amount: float) -> None:
        nonlocal done
        done += round(amount)
        if progress is not None:
            progress.update(f"measuring {images.name}", "images", done, len(indices))

    yield from batches_of(images)(indices, advance)  # type: ignore[arg-type]


def reference_features(
    images: ImageSet, extractor: FeatureExtractor, accelerator: Accelerator, progress: Progress | None = None
) -> torch.Tensor | None:
    """The features (N, D) of the images, cached on disk; None except on rank 0. All ranks share the work."""
    depends = [images.fingerprint, extractor.name, extractor.weights_hash, STATISTICS_VERSION]
    folder = cache_folder() / "features" / hashlib.sha256(json.dumps(depends).encode()).hexdigest()
    measured = filled_store(
        batches_of(images),
        len(images),
        extractor,
        accelerator,
        images.name,
        folder=folder,
        cache=True,
        progress=progress or Progress(),
    )
    with measured as store:
        return None if store is None else store.read("features")


def hash_of_images(images: ImageSet, indices: np.ndarray) -> str:
    """The hash of a reference made of the images at these int64 indices."""
    return _hash({"fingerprint": images.fingerprint, "indices": hashlib.sha256(indices.tobytes()).hexdigest()})


def floor_distance(
    reference: Reference, images: ImageSet, extractor: FeatureExtractor, *, count: int, seed: int = 0
) -> float:
    """The distance that a perfect model would reach: that of `count` other real images, chosen by `seed`."""
    others = reference_statistics(images, extractor, count=count, seed=seed)
    return frechet_distance(others.statistics, reference.statistics)


def choose(total: int, count: int | None = None, seed: int | None = None) -> np.ndarray:
    """Ascending int64 indices below `total`: all, the first `count`, or `count` chosen by `seed` without repetition."""
    if count is None:
        return np.arange(total)
    if not 0 < count <= total:
        raise InputError(f"the number of images must be 1 to {total}, which the source has, got {count}")
    return np.arange(count) if seed is None else np.sort(np.random.default_rng(seed).permutation(total)[:count])


def _hash(values: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# Files of statistics.

NPZ_KEYS = "mu and sigma (as of pytorch-fid and U-ViT) or pool_3 (as of score_sde)"
MOMENTS = {"mu", "sigma", "pool_3"}
SPATIAL_MOMENTS = {"mu_s", "sigma_s"}
"""Of ADM's reference batches, for sFID."""
IMAGES = {"images", "arr_0"}
"""The keys of an .npz of images; ADM's reference batches have 10,000 beside statistics of the whole data set."""
TEXTS = ("source", "images_hash", "features", "features_hash")


@dataclass(frozen=True)
class StatisticsFile:
    """What a file of statistics holds."""

    path: Path
    statistics: FeatureStatistics | GivenMoments
    provenance: dict[str, Any] | None
    """TEXTS, split (None: the source has no parts), shape (C, H, W) of the images and more; None for an npz, which says
    nothing of them."""
    spatial: GivenMoments | None = None
    """Of an npz with mu_s and sigma_s."""

    @property
    def features(self) -> str | None:
        """The name of the features, None where the file doesn't say."""
        return None if self.provenance is None else self.provenance["features"]


def is_statistics_file(source: str | Path) -> bool:
    """Whether a source of reference images is a file of statistics instead: any .safetensors, and an .npz of none."""
    path = Path(source)
    if path.is_dir() or path.suffix not in (".safetensors", ".npz"):
        return False
    keys = _npz_keys(path)
    return bool(keys & MOMENTS) or not keys & IMAGES


def holds_images(path: str | Path) -> bool:
    """Whether a file of statistics has images beside them, as ADM's reference batches have."""
    return bool(_npz_keys(Path(path)) & IMAGES)


def _npz_keys(path: Path) -> set[str]:
    """The names of an .npz file's arrays; none for other files, and for damaged ones, which reading will tell."""
    if path.suffix != ".npz" or not path.is_file() or not zipfile.is_zipfile(path):
        return set()
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return set()


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
        raise InputError(f"statistics must be a file of `dia-diffusion stats make` or an npz, got {path}: no such file")
    if path.suffix == ".npz":
        statistics, spatial = _read_npz(path)
        return StatisticsFile(path, statistics, None, spatial)
    statistics, provenance = FeatureStatistics.load(path)
    if not isinstance(provenance, dict) or not all(isinstance(provenance.get(name), str) for name in TEXTS):
        raise InputError(f"{path} doesn't say what it was made of, which takes texts for {', '.join(TEXTS)}")
    if not isinstance(provenance.get("split"), str | None):
        raise InputError(f"the split in {path} must be a name or none, got {provenance['split']}")
    shape = provenance.get("shape")
    if not isinstance(shape, list) or len(shape) != 3 or not all(isinstance(length, int) for length in shape):
        raise InputError(f"the shape of images in {path} must be three numbers (C, H, W), got {shape}")
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
        return Reference(file.path.name, None, None, sha256_of_file(path), file.statistics, spatial=file.spatial)
    known = file.provenance
    return Reference(known["source"], known["split"], made_of, known["images_hash"], file.statistics)


def with_images(
    reference: Reference,
    path: str,
    shape: tuple[int, int, int],
    extractor: FeatureExtractor,
    protocol: EvalProtocol,
    accelerator: Accelerator,
    progress: Progress,
) -> Reference:
    """The reference that a file of statistics is, with the features of the images that it has beside them.

    Raises InputError for images of another shape than those measured, (C, H, W): reduced to that, they wouldn't be what
    the statistics are of. Or if they are too few for a metric.
    """

    def check() -> None:
        pixels = numpy_archive(Path(path)).array
        assert pixels is not None
        height, width, channels = pixels.shape[1:]
        if (channels, height, width) != shape:
            raise InputError(
                f"`--reference` must hold images of {_sizes(shape)}, as are measured, got {path} with images of "
                f"{_sizes((channels, height, width))}"
            )
        protocol.check_count(len(pixels), reference=True)

    on_all_ranks(accelerator, check)
    images = open_images_on_ranks(path, accelerator, progress, channels=shape[0])
    features = reference_features(images, extractor, accelerator, progress)
    return replace(reference, features=features, beside_statistics=len(images))


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


def _read_npz(path: Path) -> tuple[FeatureStatistics | GivenMoments, GivenMoments | None]:
    """The statistics of features and, of ADM's files, those of spatial features."""
    try:
        with np.load(path, allow_pickle=False) as file:
            refuse_bomb(file.zip, path)
            keys = file.files
            arrays = {name: file[name] for name in sorted(MOMENTS | SPATIAL_MOMENTS) if name in keys}
            if any(isinstance(array, bytes) for array in arrays.values()):  # as numpy gives what is in no .npy format
                raise ValueError("its entries are no arrays")
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


def _of_features(path: Path, features: np.ndarray, block: int = 4096) -> FeatureStatistics:
    """The statistics of the features (N, D) themselves."""
    if features.ndim != 2 or len(features) < 2:
        raise InputError(f"pool_3 in {path} must be (N, D) of 2 images or more, got {features.shape}")
    statistics = FeatureStatistics(features.shape[1])
    for start in range(0, len(features), block):
        statistics.update(torch.from_numpy(features[start : start + block].astype(np.float64)))
    check_moments(path, statistics.sum.numpy(), statistics.outer.numpy())
    return statistics


def _sizes(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[2]} with {shape[0]} channel{'s' if shape[0] > 1 else ''}"
