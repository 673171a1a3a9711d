"""The covered images' attention maps, one batch after another, as they are and without their mean over images."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
from torch import nn

from dia_diffusion.analysis.map_moments import MapMoments
from dia_diffusion.analysis.stages import attended_stages, maps_during
from dia_diffusion.analysis.trained_run import Coverage, TrainedRun

Maps = npt.NDArray[np.float64]


def map_stream(
    run: TrainedRun, model: nn.Module, coverage: Coverage, number: int = 0
) -> Iterator[tuple[int, list[Maps]]]:
    """Pairs of (time's index, h (L, B, N) of each stage with a unit), batch after batch.

    number: of the draws; those of another number are other images.
    """
    stages = attended_stages(model)
    draws = run.draw(coverage.seed, number, coverage.num_images)
    for batch in run.batches(draws, run.num_times(coverage.num_times), coverage.batch_size):
        maps = maps_during(stages, partial(batch.losses, model))
        yield batch.time, [h.cpu().double().numpy() for h in maps]
        coverage.progress(batch.images.stop - batch.images.start)


def centred(h: Maps, moments: MapMoments, time: int) -> Maps:
    """Maps (L, B, N) less each channel's mean over images at their time: what only the image can explain."""
    return h - moments.mean[:, time, None]
