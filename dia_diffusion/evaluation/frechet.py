"""The Frechet distance between two Gaussians, from their moments (Dowson and Landau 1982; Heusel et al. 2017)."""

from typing import Protocol

import numpy as np

from dia_diffusion.errors import InputError


class Moments(Protocol):
    """Anything with a mean (D,) and a covariance (D, D), both float64."""

    @property
    def mean(self) -> np.ndarray: ...

    @property
    def covariance(self) -> np.ndarray: ...


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), at least 0, and the same both ways up to rounding.

    tr (A B)^(1/2) is the sum of the singular values of R_a' R_b, where A = R_a R_a' by symmetric eigenvalues. Unlike
    roots of A B's eigenvalues, this loses no digits where a covariance is singular (fewer samples than dimensions).

    Raises InputError when the two have different dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"statistics of {a.mean.size} and of {b.mean.size} features can't be compared")
    difference = a.mean - b.mean
    covariance_a, covariance_b = a.covariance, b.covariance
    overlap = np.linalg.svd(_root(covariance_a).T @ _root(covariance_b), compute_uv=False).sum()
    distance = difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap
    return max(float(distance), 0.0)


def _root(covariance: np.ndarray) -> np.ndarray:
    """R (D, rank) with R R' = covariance; eigenvalues within rounding of zero are left out."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * np.finfo(values.dtype).eps
    return vectors[:, kept] * np.sqrt(values[kept])
