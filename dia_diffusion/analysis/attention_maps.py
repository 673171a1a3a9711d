"""The attention map h over depth, time, class, image and channel: what a unit does in a trained network."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from dia_diffusion.analysis.class_share import ClassMeans
from dia_diffusion.analysis.map_moments import MapMoments, split_variance
from dia_diffusion.analysis.stages import Stage, attended_stages, maps_during
from dia_diffusion.analysis.trained_run import DEFAULT_COVERAGE, Coverage, TrainedRun

RANGE = (10, 90)  # percentiles over channels


def attention_maps(model: nn.Module, *inputs: Any) -> Tensor:
    """h (L, B, N), float32, of each of the L blocks that carry the unit, of a network that is one stage.

    inputs: what the network is called with, for a UViT noisy samples (B, C, H, W), network times (B,) and labels.

    Raises:
        InputError: the network has no unit.
        ValueError: it has several stages; `stages.maps_during` gives the maps of each.
    """
    (maps,) = maps_during(attended_stages(model), lambda: model(*inputs))
    return maps


def measure_maps(
    run: TrainedRun, model: nn.Module, coverage: Coverage, classes: Sequence[ClassMeans] | None = None
) -> list[MapMoments]:
    """The moments, for each stage with a unit, of h over the covered images, each with one noise.

    classes: one for each such stage, which the maps are added to.
    """
    stages, num_times = attended_stages(model), run.num_times(coverage.num_times)
    draws = run.draw(coverage.seed, 0, coverage.num_images)
    labels = run.classes(draws)
    sums = [np.zeros((2, len(stage.attended), num_times, stage.channels)) for stage in stages]
    for batch in run.batches(draws, num_times, coverage.batch_size):
        maps = maps_during(stages, partial(batch.losses, model))
        for index, h in enumerate(h.cpu().double().numpy() for h in maps):  # (L, B, N)
            sums[index][0, :, batch.time] += h.sum(axis=1)
            sums[index][1, :, batch.time] += np.square(h).sum(axis=1)
            if classes is not None and labels is not None:
                classes[index].add(h, batch.time, labels[batch.images])
        coverage.progress(batch.images.stop - batch.images.start)
    means = [total / coverage.num_images for total in sums]
    return [MapMoments(mean, np.maximum(squares - mean**2, 0.0)) for mean, squares in means]


def summary(moments: Sequence[MapMoments]) -> dict[str, Any]:
    """The numbers of one step, for a record: means by block and time, the range over channels, shares of variance.

    The blocks of all stages follow each other.
    """
    by_channel = [each.mean.mean(axis=1) for each in moments]  # (L, N)
    low, high = np.concatenate([np.percentile(blocks, RANGE, axis=1) for blocks in by_channel], axis=1)
    terms = split_variance(moments)
    blocks = [split_variance([each.block(index)]) for each in moments for index in range(len(each.mean))]
    by_block = np.concatenate([each.mean(axis=1) for each in by_channel])
    return {
        "mean": float(by_block.mean()),
        "variance": sum(terms.values()),
        "shares": _shares(terms),
        "mean_by_block": by_block.tolist(),
        "low_by_block": low.tolist(),
        "high_by_block": high.tolist(),
        "mean_by_block_and_time": np.concatenate([each.mean.mean(axis=2) for each in moments]).tolist(),
        "variance_by_block": [sum(block.values()) for block in blocks],
        "shares_by_block": [_shares(block) for block in blocks],
    }


def maps_of_run(
    run: TrainedRun, steps: Sequence[int] | None = None, coverage: Coverage = DEFAULT_COVERAGE
) -> dict[str, Any]:
    """A run's record: the summary of each step's averaged weights, and of the first weights where all steps are meant.

    Raises:
        InputError: the run has no unit, or no weights of a step.
    """
    run.require_unit()
    measured: list[dict[str, Any]] = []
    stages: list[Stage] = []
    for step in run.with_first(steps):
        model = run.model(step)
        stages, num_times = attended_stages(model), run.num_times(coverage.num_times)
        classes = [ClassMeans(len(stage.attended), num_times, stage.channels) for stage in stages]
        moments = measure_maps(run, model, coverage, classes)
        record = {**run.measured(step), **summary(moments)}
        if run.images.labels is not None:
            record["classes"] = ClassMeans.summary(classes, moments, run.images.class_names)
        measured.append(record)
    return {
        **run.described(),
        "has_times": run.has_times,
        "stages": [{"name": stage.name, "blocks": stage.attended_blocks} for stage in stages],
        "steps": measured,
    }


def _shares(terms: dict[str, float]) -> dict[str, float]:
    whole = sum(terms.values())
    return {name: term / whole if whole else 0.0 for name, term in terms.items()}
