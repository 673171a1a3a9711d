"""Mean and covariance of features, summed in a stream: memory does not grow with the number of images."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dia_diffusion.errors import InputError
from dia_diffusion.io import atomic_file
from dia_diffusion.reading import parse_json


class FeatureStatistics:
    """Count, sum and sum of outer products of feature vectors, in float64 on the CPU.

    Plain sums need no shift by a first mean: a product of two float32 numbers is exact in float64, so the covariance's
    error is about 1e-16 (mean / standard deviation)^2 of itself, and features don't lie a million deviations from zero.
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

    def merge(self, other: "FeatureStatistics") -> None:
        """Adds what another stream has seen."""
        self.count += other.count
        self.sum += other.sum
        self.outer += other.outer

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
        """Writes a whole safetensors file with `provenance` (anything JSON can hold) in its header."""
        tensors = {"count": torch.tensor(self.count), "sum": self.sum, "outer": self.outer}
        text = json.dumps(provenance)
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata={"provenance": text, "sha256": _sha256(text, *tensors.values())})

    @classmethod
    def load(cls, path: str | Path) -> tuple["FeatureStatistics", dict[str, Any]]:
        """The statistics and the provenance of a file that `save` wrote. Raises InputError for any other file."""
        try:
            if not Path(path).is_file():  # a pipe would be waited for
                raise OSError("not a regular file")
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                provenance = parse_json(metadata["provenance"])
                count, total, outer = (file.get_tensor(name) for name in ("count", "sum", "outer"))
            sha256 = _sha256(metadata["provenance"], count, total, outer)
            if metadata.get("sha256", sha256) != sha256:  # older files have none
                raise ValueError("its sha256 differs")
            if total.is_complex() or outer.is_complex():
                raise ValueError("complex numbers")
            statistics = cls(0)  # of the file's own size, a long sum alone would ask for its square
            statistics.count, statistics.sum, statistics.outer = int(count), total.double(), outer.double()
        except (OSError, SafetensorError, TypeError, KeyError, ValueError, OverflowError, RuntimeError) as error:
            raise InputError(f"{path} is not a whole file of feature statistics ({type(error).__name__})") from error
        if statistics.count < 2:
            raise InputError(f"{path} says it was made of {statistics.count} images; accepted: 2 or more")
        check_moments(path, statistics.sum.numpy(), statistics.outer.numpy(), "sum of outer products")
        return statistics, provenance


def _sha256(text: str, *tensors: torch.Tensor) -> str:
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class GivenMoments:
    """A mean (D,) and a covariance (D, D), both float64, as other programs' files hold them."""

    mean: np.ndarray
    covariance: np.ndarray
    count: None = None
    """Such files don't say of how many images they are."""


def check_moments(path: str | Path, first: np.ndarray, second: np.ndarray, what: str = "covariance") -> None:
    """Raises InputError, naming the file, unless `first` is (D,), `second` symmetric (D, D), and all of it finite."""
    if first.ndim != 1 or second.shape != (first.size, first.size) or first.size == 0:
        raise InputError(f"{path} holds arrays of {first.shape} and {second.shape}; accepted: (D,) and (D, D)")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise InputError(f"{path} holds values that aren't finite")
    scale = np.abs(second).max()
    if np.abs(second - second.T).max() > 1e-5 * scale:
        raise InputError(f"{path} holds a {what} that isn't symmetric")
    if second.diagonal().min() < 0:
        raise InputError(f"{path} holds a {what} with negative numbers on its diagonal")
