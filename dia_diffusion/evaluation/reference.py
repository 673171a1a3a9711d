"""Reference images: their statistics and features, cached on disk."""

import hashlib
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from dia_diffusion.data import ImageSet
from dia_diffusion.data.arrays import numpy_archive
from dia_diffusion.data.sources import open_images_on_ranks
from dia_diffusion.distributed import first_on_each_machine, on_all_ranks
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.feature_store import batches_of, filled_store
from dia_diffusion.evaluation.features.extractor import FeatureExtractor
from dia_diffusion.evaluation.frechet import (
    SUM_BLOCK,
    FeatureStatistics,
    Moments,
    frechet_distance,
    sums,
)
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.statistics_file import (
    STATISTICS_VERSION,
    is_statistics_file,
    read_statistics,
    refuse_other_features,
    sizes_text,
)
from dia_diffusion.io import cache_folder, sha256_of_file, sha256_of_json
from dia_diffusion.progress import Progress

OTHER_SPLIT = {"train": "test", "test": "train"}


@dataclass(frozen=True)
class Reference:
    """Real images to measure distances to. None: not given by a file of statistics."""

    name: str
    split: str | None
    shape: tuple[int, int, int] | None
    """(C, H, W)"""
    hash: str
    """Hash of the chosen images, independent of the features; of the file, if it doesn't say which images they were."""
    statistics: Moments
    features: torch.Tensor | None = None
    """(M, D), on rank 0 and only if a metric needs them."""
    spatial: Moments | None = None
    """The statistics of the extractor's spatial features, if a metric needs them or a file has them."""
    num_feature_images: int | None = None
    """The number of images behind `features`, if a file has these images in addition to statistics of others."""


@dataclass(frozen=True)
class HeldOut:
    """Real images outside the reference, for comparison in metric fdr."""

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
    """The images as the reference of a protocol, on all ranks.

    Raises:
        InputError: another number of images than the protocol requires, or too few for a metric.
    """
    check_reference_count(protocol, images.name, len(images))
    protocol.check_count(len(images), reference=True)
    features = None
    if protocol.needs("reference features"):
        features = reference_features(images, extractor, accelerator, progress)
    spatial = protocol.needs("spatial")
    compute = partial(reference_statistics, images, extractor, progress=progress, features=features, spatial=spatial)
    return replace(first_on_each_machine(accelerator, compute), features=features)


def check_reference_count(protocol: EvalProtocol, name: str, count: int | None) -> None:
    """Raises InputError if the protocol requires another number of reference images."""
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
        features: (N, D) of exactly these images, if they are known.
        spatial: also the statistics of the spatial features, which the extractor must have, from the same pass.

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
    paths = {
        layer: cache_folder() / "statistics" / f"{sha256_of_json(text)}.safetensors"
        for layer, text in described.items()
    }
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
        with suppress(OSError):  # without a cache if it can't be written
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
    folder = cache_folder() / "features" / sha256_of_json(depends)
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
    return sha256_of_json({"fingerprint": images.fingerprint, "indices": hashlib.sha256(indices.tobytes()).hexdigest()})


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
        raise InputError(f"the number of images must be 1 to {total}, the size of the source, got {count}")
    return np.arange(count) if seed is None else np.sort(np.random.default_rng(seed).permutation(total)[:count])


def open_reference(path: str | Path, extractor: FeatureExtractor, shape: tuple[int, int, int]) -> Reference:
    """A file of statistics as the reference for images of `shape` (C, H, W) in an extractor's features.

    Raises InputError for statistics of other features, other weights, other dimensions, or images of another shape.
    """
    file = read_statistics(path)
    if file.provenance is not None:
        refuse_other_features(file, extractor.name, extractor.weights_hash, "measured")
        made_of = tuple(file.provenance["shape"])
        if made_of != shape:
            raise InputError(
                f"{path} was made from images of {sizes_text(made_of)}, but those measured are {sizes_text(shape)}; "
                f"`dia-diffusion stats make SOURCE OUT --size {shape[1]} --channels {shape[0]}` makes them the same"
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
    """Adds the features of the images in a file of statistics to the reference from that file.

    Raises InputError if the images are too few for a metric, or don't have the measured shape (C, H, W): if resized,
    they would no longer match the statistics.
    """

    def check() -> None:
        pixels = numpy_archive(Path(path)).array
        assert pixels is not None
        height, width, channels = pixels.shape[1:]
        if (channels, height, width) != shape:
            raise InputError(
                f"`--reference` must hold images of {sizes_text(shape)}, like the measured images, "
                f"got {path} with images of {sizes_text((channels, height, width))}"
            )
        protocol.check_count(len(pixels), reference=True)

    on_all_ranks(accelerator, check)
    images = open_images_on_ranks(path, accelerator, progress, channels=shape[0])
    features = reference_features(images, extractor, accelerator, progress)
    return replace(reference, features=features, num_feature_images=len(images))
