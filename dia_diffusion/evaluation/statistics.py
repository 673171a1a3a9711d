"""Mean and covariance of features, summed in a stream: memory does not grow with the number of images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dia_diffusion.errors import InputError
from dia_diffusion.files import whole_file


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

    def reduce(self) -> None:
        """Sums over the processes of torch.distributed, where there are several: afterwards each holds the whole."""
        if not dist.is_initialized():
            return
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        count = torch.tensor([self.count], dtype=torch.float64)
        packed = torch.cat([count, self.sum, self.outer.flatten()]).to(device)
        dist.all_reduce(packed)
        packed = packed.cpu()
        self.count = round(packed[0].item())
        self.sum = packed[1 : 1 + len(self.sum)]
        self.outer = packed[1 + len(self.sum) :].view_as(self.outer)

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
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata={"provenance": json.dumps(provenance)})

    @classmethod
    def load(cls, path: str | Path) -> tuple["FeatureStatistics", dict[str, Any]]:
        """The statistics and the provenance of a file that `save` wrote. Raises InputError for any other file."""
        try:
            with safe_open(path, framework="pt") as file:
                provenance = json.loads(file.metadata()["provenance"])
                count, total, outer = (file.get_tensor(name) for name in ("count", "sum", "outer"))
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise InputError(f"{path} is not a whole file of feature statistics ({type(error).__name__})") from error
        statistics = cls(len(total))
        statistics.count, statistics.sum, statistics.outer = int(count), total, outer
        return statistics, provenance
