"""The Frechet distance between two Gaussians: the statistics of features, the distance, and its bootstrap interval."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.linalg import lapack

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features.extractor import FeatureExtractor
from dia_diffusion.io import atomic_file
from dia_diffusion.reading import parse_json


class FeatureStatistics:
    """Count, sum and sum of outer products of feature vectors, in float64 on the CPU.

    Plain sums don't need a mean subtracted first: a product of two float32 numbers is exact in float64, so the
    covariance's relative error is about 1e-16 (mean / standard deviation)^2, and no feature has a mean of a million
    standard deviations.
    """

    def __init__(self, num_features: int) -> None:
        self.count = 0
        self.sum = torch.zeros(num_features, dtype=torch.float64)
        self.outer = torch.zeros(num_features, num_features, dtype=torch.float64)

    def update(self, features: torch.Tensor) -> None:
        """Adds features (B, D) of any float type, on any device."""
        features = features.detach().cpu().double()
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features

    def merge(self, other: "FeatureStatistics", sign: Literal[1, -1] = 1) -> "FeatureStatistics":
        """The statistics of both sets of images; with sign -1, of the images that aren't in `other`, a subset."""
        merged = FeatureStatistics(0)
        merged.count = self.count + sign * other.count
        merged.sum = self.sum + sign * other.sum
        merged.outer = self.outer + sign * other.outer
        return merged

    @property
    def mean(self) -> np.ndarray:
        """The mean feature vector (D,), float64."""
        return (self.sum / self.count).numpy()

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance (D, D), float64. Raises InputError for fewer than 2 images."""
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 images, got {self.count}")
        mean = self.sum / self.count
        return ((self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)).numpy()

    def save(self, path: str | Path, provenance: dict[str, Any]) -> None:
        """Writes a safetensors file with `provenance` (anything JSON can hold) in its header."""
        tensors = {"count": torch.tensor(self.count), "sum": self.sum, "outer": self.outer}
        save_tensors(path, tensors, json.dumps(provenance))

    @classmethod
    def load(cls, path: str | Path) -> tuple["FeatureStatistics", dict[str, Any]]:
        """The statistics and the provenance of a file that `save` wrote. Raises InputError for any other file."""
        try:
            (count, total, outer), text = load_tensors(path, ("count", "sum", "outer"))
            provenance = parse_json(text)
            if total.is_complex() or outer.is_complex():
                raise ValueError("complex numbers")
            statistics = cls(0)  # sized for the file, it would allocate the square of a long sum
            statistics.count, statistics.sum, statistics.outer = int(count), total.double(), outer.double()
        except UNREADABLE as error:
            raise InputError(
                f"{path} is truncated, corrupted or not a file of feature statistics ({type(error).__name__})"
            ) from error
        if statistics.count < 2:
            raise InputError(f"statistics in {path} must be of 2 images or more, got {statistics.count}")
        check_moments(path, statistics.sum.numpy(), statistics.outer.numpy(), "sum of outer products")
        return statistics, provenance


UNREADABLE = (OSError, SafetensorError, TypeError, KeyError, ValueError, OverflowError, RuntimeError)
"""Errors from reading a file of tensors that is truncated or altered, or a file of another kind."""


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor], text: str) -> None:
    """Writes a safetensors file atomically, with a text in its header and a sha256 over both."""
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"provenance": text, "sha256": _sha256(text, *tensors.values())})


def load_tensors(path: str | Path, names: Sequence[str]) -> tuple[list[torch.Tensor], str]:
    """The named tensors and the text of a file that `save_tensors` wrote. Raises UNREADABLE."""
    if not Path(path).is_file():  # opening a pipe would block
        raise OSError("not a regular file")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = [file.get_tensor(name) for name in names]
    sha256 = _sha256(metadata["provenance"], *tensors)
    if metadata.get("sha256", sha256) != sha256:  # older files have none
        raise ValueError("its sha256 differs")
    return tensors, metadata["provenance"]


def _sha256(text: str, *tensors: torch.Tensor) -> str:
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


SUM_BLOCK = 4096  # rows of features summed at once


def measure(images: Iterable[torch.Tensor], extractor: FeatureExtractor) -> FeatureStatistics:
    """The statistics of uint8 batches (B, C, H, W), each discarded once it is measured."""
    return sums((extractor(batch) for batch in images), extractor.num_features)


def sums(blocks: Iterable[torch.Tensor], num_features: int) -> FeatureStatistics:
    """The statistics of features in blocks (B, num_features)."""
    statistics = FeatureStatistics(num_features)
    for rows in blocks:
        statistics.update(rows)
    return statistics


@dataclass(frozen=True)
class GivenMoments:
    """A mean (D,) and a covariance (D, D), both float64, from another program's file."""

    mean: np.ndarray
    covariance: np.ndarray
    count: None = None
    """Such files don't give the number of images."""


Moments = FeatureStatistics | GivenMoments
"""A mean (D,) and a covariance (D, D), both float64."""


def check_moments(path: str | Path, first: np.ndarray, second: np.ndarray, what: str = "covariance") -> None:
    """Raises InputError, naming the file, unless `first` is (D,), `second` symmetric (D, D), and all of it finite."""
    if first.ndim != 1 or second.shape != (first.size, first.size) or first.size == 0:
        raise InputError(f"the arrays in {path} must be (D,) and (D, D), got {first.shape} and {second.shape}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise InputError(f"{path} holds values that aren't finite")
    scale = np.abs(second).max()
    if np.abs(second - second.T).max() > 1e-5 * scale:
        raise InputError(f"{path} holds a {what} that isn't symmetric")
    if second.diagonal().min() < 0:
        raise InputError(f"{path} holds a {what} with negative numbers on its diagonal")


TOLERANCE = 1e-12
"""The largest rounding error of the overlap, as a fraction of it."""


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), at least 0, and symmetric up to rounding.

    Raises InputError when the two have different dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"statistics of {a.mean.size} and of {b.mean.size} features can't be compared")
    difference = a.mean - b.mean
    covariance_a, covariance_b = a.covariance, b.covariance
    traces = np.trace(covariance_a) + np.trace(covariance_b)
    distance = difference @ difference + traces - 2 * _overlap(covariance_a, covariance_b)
    return max(float(distance), 0.0)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """tr (A B)^(1/2), the sum of the roots of the eigenvalues of R' B R, where A = R R'.

    Symmetric eigenvalues take a third of the time of those of A B. The error of an eigenvalue is about eps times a
    diagonal element, and that of its root is this divided by twice the root: negligible, unless there are zero
    eigenvalues that the rank of A doesn't reveal. Swapping A and B may leave fewer of them, or none; if that isn't
    enough, the singular values of R_a' R_b are exact, at three times the cost.
    """
    for one, other in ((a, b), (b, a)):
        products = _products(one, other)
        values = _eigenvalues(products)  # (rank,), ascending
        if not (values > 0).all():
            continue
        roots, eps = np.sqrt(values), np.finfo(values.dtype).eps
        if (eps * np.sort(products.diagonal()) / roots / 2).sum() <= TOLERANCE * roots.sum():
            return float(roots.sum())
    (root_a, order_a), (root_b, order_b) = _root(a), _root(b)
    in_place_a, in_place_b = root_a[np.argsort(order_a)], root_b[np.argsort(order_b)]
    return float(np.linalg.svd(in_place_a.T @ in_place_b, compute_uv=False).sum())


def _eigenvalues(symmetric: np.ndarray) -> np.ndarray:
    """Eigenvalues from the lower triangle (n, n), ascending; torch's LAPACK takes half NumPy's time on Intel CPUs."""
    return torch.linalg.eigvalsh(torch.from_numpy(symmetric)).numpy()


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """R' B R (rank, rank), lower triangle, where A = R R'."""
    root, order = _root(a)
    ordered = b[np.ix_(order, order)]
    if root.shape[0] == root.shape[1]:
        return lapack.dsygst(ordered.T, root, itype=2, lower=1, overwrite_a=1)[0]  # a third of the cost of the product
    return root.T @ ordered @ root


def _root(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R (D, rank), lower triangular, and an order such that R R' = covariance[order][:, order].

    A Cholesky factor, with the largest pivot first. This finds the rank, since pivots within rounding of zero are left
    out, and sorts by size; otherwise small eigenvalues would be lost in the rounding of large ones.
    """
    factor, pivots, rank, _ = lapack.dpstrf(covariance.T, lower=1)
    return np.triu(factor.T).T[:, :rank], pivots - 1  # Fortran order, for LAPACK


BLOCK = 8192  # rows multiplied at once in float64
MIN_RESAMPLES, SEED, LEVEL = 10, 0, 0.95


@dataclass(frozen=True)
class Interval:
    """The interval for the distance of an equal number of other images, and the standard deviation between sets."""

    low: float
    high: float
    standard_error: float


def bootstrap_interval(
    features: torch.Tensor,
    reference: Moments,
    distance: float,
    resamples: int,
    progress: Callable[[int, int], None] | None = None,
) -> Interval:
    """The 95 % interval of `distance`, from features (N, D) to the reference, over resamples of the N images.

    The interval is for the mean distance of N images of this model: the distance that a second set of N images would
    have. A resample has only 63 % of the images, and a Frechet distance decreases with their number, so most or all
    resampled distances are larger than the measured one, and an interval of their plain percentiles would miss the
    truth. Their spread is correct although their location is not. So the percentiles are taken of their deviations from
    their own mean, and added to the distance. (The "basic" interval, 2 x distance - percentiles, would subtract the
    bias of the distance itself and be valid for infinitely many images, unlike any recorded distance.)

    Compared with new sets drawn from Gaussians (tests/evaluation/test_bootstrap.py), the standard error is right if the
    bias is under a tenth of the distance, a tenth too large if it is a sixth, and up to twice too large if it is nearly
    all of it, as between two sets of the same kind: the interval is then too wide, not too narrow.

    The reference is assumed to be exact, and the variation over training seeds is not included. Resamples use seed 0.
    `progress` is called with (resamples done before, total).
    Memory: up to 8 N D bytes, two float32 arrays. Time on one core: a resample of 5,000 images takes 0.04 s in 256
    features, 1.5 s in 2,048.
    """
    resampled = _ResampledDistance(features, reference)
    generator = np.random.default_rng(SEED)
    count = len(features)
    distances = np.empty(resamples)
    for index in range(resamples):
        times = np.bincount(generator.integers(count, size=count), minlength=count)
        distances[index] = resampled(times)
        if progress is not None:
            progress(index, resamples)
    deviations = distances - distances.mean()
    low, high = np.quantile(deviations, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(max(distance + float(low), 0.0), distance + float(high), float(distances.std(ddof=1)))


class _ResampledDistance:
    """The Frechet distance if image k counts times[k] times.

    tr (A B)^(1/2) is the sum of the roots of the eigenvalues of R' A R with B = R R', so with rows Y = X R computed
    once, a resample costs one product Y'Y and one set of eigenvalues.
    """

    def __init__(self, features: torch.Tensor, reference: Moments) -> None:
        values, vectors = np.linalg.eigh(reference.covariance)
        kept = values > values[-1] * len(values) * np.finfo(values.dtype).eps
        root = vectors[:, kept] * np.sqrt(values[kept])  # (D, rank)
        self.count = len(features)
        self.features = features.numpy()  # (N, D) float32
        mean = np.sum([rows.double().sum(0).numpy() for rows in features.split(BLOCK)], axis=0) / self.count
        self.squares = np.empty(self.count)  # (N,), squared distances to the mean
        self.rotated = np.empty((self.count, root.shape[1]), np.float32)  # (N, rank)
        for start in range(0, self.count, BLOCK):
            rows = self.features[start : start + BLOCK] - mean
            self.squares[start : start + BLOCK] = (rows**2).sum(1)
            self.rotated[start : start + BLOCK] = rows @ root
        self.offset = mean - reference.mean
        self.reference_trace = np.trace(reference.covariance)

    def __call__(self, times: np.ndarray) -> float:
        """The distance for integers times (N,), whose sum is N."""
        # The mean moves by sum_k (times[k] - 1) x_k / N; float32 is enough for that.
        move = ((times - 1).astype(np.float32) @ self.features).astype(np.float64) / self.count
        trace = (times @ self.squares - self.count * move @ move) / (self.count - 1)
        offset = self.offset + move
        return float(offset @ offset + trace + self.reference_trace - 2 * self._overlap(times))

    def _overlap(self, times: np.ndarray) -> float:
        """tr (A B)^(1/2)"""
        chosen = np.flatnonzero(times)
        center = (times.astype(np.float32) @ self.rotated).astype(np.float64) / self.count
        rank = self.rotated.shape[1]
        if len(chosen) < rank:  # fewer rows than columns: the other product has the same eigenvalues
            rows = self._rows(chosen, times, center)
            product = rows @ rows.T
        else:
            product = np.zeros((rank, rank))
            for start in range(0, len(chosen), BLOCK):
                rows = self._rows(chosen[start : start + BLOCK], times, center)
                product += rows.T @ rows
        values = _eigenvalues(product / (self.count - 1))
        return float(np.sqrt(values.clip(min=0)).sum())

    def _rows(self, chosen: np.ndarray, times: np.ndarray, center: np.ndarray) -> np.ndarray:
        """The chosen rows of Y, centered, each times the root of its count, float64."""
        return (self.rotated[chosen] - center) * np.sqrt(times[chosen])[:, None]
