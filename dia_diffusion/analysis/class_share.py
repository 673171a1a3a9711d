"""How much of the attention map's variance over images their classes explain.

At each block, channel and time, with n_c images of class c among I, C classes, and means m_c and m:

    between = sum_c n_c (m_c - m)^2,   total = sum_i (h_i - m)^2,   share = between / total

with both sums pooled over blocks, channels and times. Classes that mean nothing reach (C - 1) / (I - 1) on average;
`adjusted` is 1 - (1 - share) (I - 1) / (I - C), which is then 0 (Kelley's epsilon squared, the adjusted R^2).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dia_diffusion.analysis.map_moments import MapMoments


class ClassMeans:
    """The means of a stage's h by class, from sums: memory grows with classes, not with images."""

    def __init__(self, num_blocks: int, num_times: int, channels: int):
        self.shape = (num_blocks, num_times, channels)
        self.sums: dict[int, npt.NDArray[np.float64]] = {}
        self.counts: dict[int, int] = {}  # of images, at each time

    def add(self, h: npt.NDArray[np.float64], time: int, labels: npt.NDArray[np.int64]) -> None:
        """More maps (L, B, N) at the time of that index, of images of these classes (B,)."""
        for label in np.unique(labels):
            of_class = h[:, labels == label]
            if label not in self.sums:
                self.sums[int(label)], self.counts[int(label)] = np.zeros(self.shape), 0
            self.sums[int(label)][:, time] += of_class.sum(axis=1)
            self.counts[int(label)] += of_class.shape[1] if time == 0 else 0

    def means(self) -> dict[int, npt.NDArray[np.float64]]:
        """class -> (L, T, N)."""
        return {label: self.sums[label] / self.counts[label] for label in sorted(self.sums)}

    @staticmethod
    def summary(
        stages: Sequence["ClassMeans"], moments: Sequence[MapMoments], names: Sequence[str] | None
    ) -> dict[str, Any]:
        """For a record, of all stages and of each block: the share; each class's mean h less that of all images."""
        counts = stages[0].counts
        labels, images = sorted(counts), sum(counts.values())
        between, total, deviations = [], [], []
        for stage, whole in zip(stages, moments, strict=True):
            apart = {label: mean - whole.mean for label, mean in stage.means().items()}
            between.append(np.sum([counts[c] * np.square(apart[c]).mean(axis=(1, 2)) for c in labels], axis=0))  # (L,)
            total.append(images * whole.variance.mean(axis=(1, 2)))
            deviations.append(np.stack([apart[c].mean(axis=(1, 2)) for c in labels]))  # (C, L)
        of_block, of_total = np.concatenate(between), np.concatenate(total)
        return {
            "names": [names[c] if names else str(c) for c in labels],
            "counts": [counts[c] for c in labels],
            **_told(float(of_block.sum()), float(of_total.sum()), len(labels), images),
            "share_by_block": [b / t if t else 0.0 for b, t in zip(of_block.tolist(), of_total.tolist(), strict=True)],
            "deviation_by_class_and_block": np.concatenate(deviations, axis=1).tolist(),
        }


def _told(between: float, total: float, num_classes: int, images: int) -> dict[str, float | None]:
    share = between / total if total else 0.0
    spare = images - num_classes
    return {
        "share": share,
        "share_by_chance": (num_classes - 1) / (images - 1),
        "adjusted": 1 - (1 - share) * (images - 1) / spare if spare > 0 and total else None,
    }
