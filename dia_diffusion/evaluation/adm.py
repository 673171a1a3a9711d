"""Inception score, precision and recall as ADM's evaluator computes them (Dhariwal and Nichol 2021, arXiv 2105.05233).

ADM's evaluator is evaluations/evaluator.py of github.com/openai/guided-diffusion. docs/evaluation.md says what can
differ.
"""

import torch
from torch import Tensor

from dia_diffusion.precision import exact_float32

ROWS = 1000  # rows of pairwise distances held at once
LARGEST_NORM = torch.finfo(torch.float16).max / 2
"""The largest squared norm for which no term of a squared distance overflows in float16."""


def inception_score(logits: Tensor, split_size: int) -> float:
    """The mean of exp(mean KL(p(y|x), p(y))) over consecutive splits of logits (N, K); the last one may be smaller."""
    scores = []
    for rows in logits.split(split_size):
        log_p = rows.double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - torch.tensor(len(rows), dtype=torch.float64).log()
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(features: Tensor, reference: Tensor, neighbors: int) -> tuple[float, float]:
    """Precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991) with squared distances in float16.

    A row is within another set if, for any row of that set, it is no farther than that row's `neighbors`-th nearest
    neighbor in its own set. Features that would overflow are compared in float32.

    Args:
        features: (N, D), float32.
        reference: (M, D), on the same device.
    """
    fits = max(float(rows.square().sum(1).max()) for rows in (features, reference)) < LARGEST_NORM
    dtype = torch.float16 if fits else torch.float32
    with exact_float32():
        samples, real = _Rows(features, dtype), _Rows(reference, dtype)
        sample_radii, real_radii = samples.radii(neighbors), real.radii(neighbors)
        found = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        recalled = 0
        for start in range(0, len(reference), ROWS):
            distances = real.distances(start, samples)  # (ROWS, N)
            found |= (distances <= real_radii[start : start + ROWS, None]).any(0)
            recalled += int((distances <= sample_radii).any(1).sum())
    return float(found.double().mean()), recalled / len(reference)


class _Rows:
    """Feature vectors (N, D) rounded to a type, and their squared norms in it."""

    def __init__(self, features: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.values = features.to(dtype).float()  # products and sums of float16 are computed in float32, then rounded
        self.norms = torch.cat([block.square().to(dtype).float().sum(1).to(dtype) for block in self.values.split(ROWS)])

    def distances(self, start: int, others: "_Rows") -> Tensor:
        """Squared distances (ROWS, M) of the rows from `start` on, each operation rounded."""
        products = (self.values[start : start + ROWS] @ others.values.T).to(self.dtype)
        return (self.norms[start : start + ROWS, None] - 2 * products + others.norms).clamp(min=0)

    def radii(self, neighbors: int) -> Tensor:
        """The squared distances (N,) to the `neighbors`-th nearest other row."""
        starts = range(0, len(self.values), ROWS)
        nearest = [self.distances(start, self).float().topk(neighbors + 1, largest=False).values for start in starts]
        return torch.cat(nearest)[:, -1].to(self.dtype)  # the nearest is the row itself
