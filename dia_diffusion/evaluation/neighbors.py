"""The reference images nearest to samples in the features: copies, and samples far from all real images."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dia_diffusion.evaluation.reference import choose

NEIGHBORS = 5
"""A sample's distance to its fifth nearest reference image is large where real images are sparse."""
QUERIES = 1000
"""Real images in the comparison of nearest distances."""
ROWS = 100  # rows of distances held at once


@dataclass(frozen=True)
class Neighbors:
    """The nearest reference images of each sample; distances are Euclidean, between features."""

    nearest: np.ndarray
    """(N,), index of the nearest reference image."""
    distances: np.ndarray
    """(N,), to that image."""
    percentiles: np.ndarray
    """(N,), the percentage of real images that are nearer to their nearest other real image: 0 for a copy, usually
    near 50."""
    sparsity: np.ndarray
    """(N,), distances to the NEIGHBORS-th nearest reference image."""


def find_neighbors(features: Tensor, reference: Tensor, device: torch.device) -> Neighbors:
    """The neighbors of samples (N, D) among reference images (M, D), M at least NEIGHBORS.

    Memory: both sets of features, and 100 rows of distances.
    """
    reference = reference.to(device)
    distances, indices = _nearest(features.to(device), reference, NEIGHBORS)
    queries = torch.from_numpy(choose(len(reference), min(QUERIES, len(reference)), seed=0)).to(device)
    real, _ = _nearest(reference[queries], reference, 1, queries)
    usual = np.sort(real[:, 0].cpu().numpy())
    nearest = distances[:, 0].cpu().numpy()
    percentiles = 100 * np.searchsorted(usual, nearest) / len(usual)
    return Neighbors(indices[:, 0].cpu().numpy(), nearest, percentiles, distances[:, -1].cpu().numpy())


def _nearest(features: Tensor, reference: Tensor, count: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distances and indices (N, count) of the nearest rows of the reference; `own` indices (N,) don't count."""
    found = []
    for start in range(0, len(features), ROWS):
        rows = features[start : start + ROWS]
        distances = torch.cdist(rows, reference)
        if own is not None:
            distances.scatter_(1, own[start : start + ROWS, None], torch.inf)
        indices = distances.topk(count, largest=False).indices
        exact = torch.stack([(reference[each] - rows).norm(dim=1) for each in indices.T], dim=1)  # cdist rounds near 0
        order = exact.argsort(dim=1)
        found.append((exact.gather(1, order), indices.gather(1, order)))
    return torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])
