"""The attention map h over depth, time, class, image and channel: what a unit does in a trained network.

Is h an attention at all? Its variance is split by the law of total variance, over blocks l, channels n, times t and
images i, with equal weight for each block and for each value within a block:

    Var(h) = Var_l E[h|l] + E_l Var_n E[h|l,n] + E_ln Var_t E[h|l,n,t] + E_lnt Var_i h
             blocks         channels             times                   images

A learned scalar per block could do what the first term does, a learned vector of channels per block the first two, and
such a vector that depends on the time the first three. Only the last needs the features.

How much of the last term do classes explain? At each block, channel and time, with n_c of I images in class c, C
classes, and means m_c and m:

    between = sum_c n_c (m_c - m)^2,   total = sum_i (h_i - m)^2,   share = between / total

with both sums pooled over blocks, channels and times. Random classes reach (C - 1) / (I - 1) on average; `adjusted` is
1 - (1 - share) (I - 1) / (I - C), which is then 0 (Kelley's epsilon squared, the adjusted R^2).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib.colors
import matplotlib.figure
import numpy as np
import numpy.typing as npt
from matplotlib.patches import Patch
from torch import Tensor, nn

from dia_diffusion.analysis.analysis import Analysis, Record
from dia_diffusion.analysis.run import Batch, Coverage, TrainedRun
from dia_diffusion.analysis.stages import attended_stages, maps_during
from dia_diffusion.figures import COLORS, Axis, Bars, Figure, HeatMap, Item, Level, Panel, Series, block_axis
from dia_diffusion.plotting import render

SOURCES = ("blocks", "channels", "times", "images")
RANGE = (10, 90)  # percentiles over channels

Values = npt.NDArray[np.float64]


def attention_maps(model: nn.Module, *inputs: Any) -> Tensor:
    """h (L, B, N), float32, of the L blocks that carry the unit, for a network with a single stage.

    inputs: of the network; for a UViT, noisy samples (B, C, H, W), network times (B,) and labels.

    Raises:
        InputError: the network has no unit.
        ValueError: it has several stages; `stages.maps_during` gives the maps of each.
    """
    (maps,) = maps_during(attended_stages(model), lambda: model(*inputs))
    return maps


def map_stream(
    run: TrainedRun, model: nn.Module, coverage: Coverage, number: int = 0
) -> Iterator[tuple[Batch, list[Values]]]:
    """Yields each batch with h (L, B, N) of each stage with a unit.

    number: of the draws; a different number draws different images.
    """
    stages = attended_stages(model)
    draws = run.draw(coverage.seed, number, coverage.num_images)
    for batch in run.batches(draws, coverage):
        yield batch, [h.cpu().double().numpy() for h in maps_during(stages, partial(batch.losses, model))]


@dataclass(frozen=True)
class MapMoments:
    """Mean and variance of a stage's h over images, each (L, T, N) float64: blocks, times, channels."""

    mean: Values
    variance: Values

    def block(self, index: int) -> "MapMoments":
        """The moments of a single block."""
        return MapMoments(self.mean[index : index + 1], self.variance[index : index + 1])

    def center(self, h: Values, time: int) -> Values:
        """Maps (L, B, N) minus each channel's mean over images at this time: the part that only the image explains."""
        return h - self.mean[:, time, None]


class ClassMeans:
    """The means of a stage's h by class, from sums: memory grows with classes, not with images."""

    def __init__(self, num_blocks: int, num_times: int, channels: int):
        self.shape = (num_blocks, num_times, channels)
        self.sums: dict[int, Values] = {}
        self.counts: dict[int, int] = {}  # images per class

    def add(self, h: Values, time: int, labels: npt.NDArray[np.int64]) -> None:
        """Adds maps (L, B, N) at the time with this index, of images of these classes (B,)."""
        for label in map(int, np.unique(labels)):
            of_class = h[:, labels == label]
            self.sums.setdefault(label, np.zeros(self.shape))[:, time] += of_class.sum(axis=1)
            self.counts[label] = self.counts.get(label, 0) + (of_class.shape[1] if time == 0 else 0)

    @staticmethod
    def summary(stages: Sequence["ClassMeans"], moments: Sequence[MapMoments], names: Sequence[str] | None) -> Record:
        """For a record: the share, in total and by block; each class's mean h minus the mean h of all images."""
        counts = stages[0].counts
        labels, images = sorted(counts), sum(counts.values())
        between, total, deviations = [], [], []
        for stage, whole in zip(stages, moments, strict=True):
            apart = {label: stage.sums[label] / counts[label] - whole.mean for label in labels}  # (L, T, N)
            between.append(np.sum([counts[c] * np.square(apart[c]).mean(axis=(1, 2)) for c in labels], axis=0))  # (L,)
            total.append(images * whole.variance.mean(axis=(1, 2)))
            deviations.append(np.stack([apart[c].mean(axis=(1, 2)) for c in labels]))  # (C, L)
        of_block, of_total = np.concatenate(between), np.concatenate(total)
        variance, spare = float(of_total.sum()), images - len(labels)
        share = float(of_block.sum()) / variance if variance else 0.0
        return {
            "names": [names[c] if names else str(c) for c in labels],
            "counts": [counts[c] for c in labels],
            "share": share,
            "share_by_chance": (len(labels) - 1) / (images - 1),
            "adjusted": 1 - (1 - share) * (images - 1) / spare if spare > 0 and variance else None,
            "share_by_block": [b / t if t else 0.0 for b, t in zip(of_block.tolist(), of_total.tolist(), strict=True)],
            "deviation_by_class_and_block": np.concatenate(deviations, axis=1).tolist(),
        }


def measure_maps(
    run: TrainedRun, model: nn.Module, coverage: Coverage, classes: Sequence[ClassMeans] | None = None
) -> list[MapMoments]:
    """The moments of h over the covered images for each stage with a unit; each image has one noise sample.

    classes: one per such stage; the maps are added to it.
    """
    stages, num_times = attended_stages(model), run.num_times(coverage.num_times)
    sums = [np.zeros((2, len(stage.attended), num_times, stage.channels)) for stage in stages]
    for batch, maps in map_stream(run, model, coverage):
        for index, h in enumerate(maps):  # (L, B, N)
            sums[index][0, :, batch.time] += h.sum(axis=1)
            sums[index][1, :, batch.time] += np.square(h).sum(axis=1)
            if classes is not None and batch.classes is not None:
                classes[index].add(h, batch.time, batch.classes)
    means = [total / coverage.num_images for total in sums]
    return [MapMoments(mean, np.maximum(squares - mean**2, 0.0)) for mean, squares in means]


def split_variance(stages: Sequence[MapMoments]) -> dict[str, float]:
    """The four terms of the variance of h, with equal weight for each block; their sum is the variance."""
    by_channel = [moments.mean.mean(axis=1) for moments in stages]  # (L, N)
    within = [
        (blocks.var(axis=1), moments.mean.var(axis=1).mean(axis=1), moments.variance.mean(axis=(1, 2)))
        for blocks, moments in zip(by_channel, stages, strict=True)
    ]  # three arrays (L,) per stage
    channels, times, images = (float(np.concatenate(terms).mean()) for terms in zip(*within, strict=True))
    between = float(np.concatenate([blocks.mean(axis=1) for blocks in by_channel]).var())
    return {"blocks": between, "channels": channels, "times": times, "images": images}


def summary(moments: Sequence[MapMoments]) -> Record:
    """The numbers of one step: means by block and time, the range over channels, shares of variance.

    The blocks of all stages are concatenated.
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


def _shares(terms: dict[str, float]) -> dict[str, float]:
    whole = sum(terms.values())
    return {name: term / whole if whole else 0.0 for name, term in terms.items()}


def _measure(run: TrainedRun, model: nn.Module, coverage: Coverage) -> Record:
    num_times = run.num_times(coverage.num_times)
    classes = [ClassMeans(len(stage.attended), num_times, stage.channels) for stage in attended_stages(model)]
    moments = measure_maps(run, model, coverage, classes)
    record = summary(moments)
    if run.images.labels is not None:
        record["classes"] = ClassMeans.summary(classes, moments, run.images.class_names)
    return record


def _about(run: TrainedRun, coverage: Coverage) -> Record:
    stages = attended_stages(run.first_model())
    return {
        "has_times": run.has_times,
        "stages": [{"name": stage.name, "blocks": stage.attended_blocks} for stage in stages],
    }


def describe(record: Record) -> Iterator[str]:
    """At the last step: h by block, the shares of its variance, and the share that classes explain."""
    last = record["steps"][-1]
    shares = ", ".join(f"{name} {share:.1%}" for name, share in last["shares"].items())
    by_block = " ".join(f"{mean:.3f}" for mean in last["mean_by_block"])
    yield f"{record['run']}, step {last['step']:,}: h by block {by_block}; variance: {shares}"
    if classes := last.get("classes"):
        adjusted = "" if classes["adjusted"] is None else f", adjusted {classes['adjusted']:.1%}"
        share = f"{classes['share']:.1%} (by chance {classes['share_by_chance']:.1%}{adjusted})"
        yield f"  of the variance over images {len(classes['names'])} classes explain {share}"


# ---- figure

LABELS = {"blocks": "between blocks", "channels": "channels", "times": "times", "images": "images"}
MAX_CLASSES = 12  # per panel


def draw(runs: Sequence[Record]) -> matplotlib.figure.Figure:
    """A column per run: h over depth at each step, its variance shares over training, h over time and by class."""
    ends = ("low_by_block", "high_by_block")
    depth = _h_axis([0, *(h for run in runs for step in run["steps"] for end in ends for h in step[end])])
    by_time = [blocks for run in runs if run["has_times"] for blocks in run["steps"][-1]["mean_by_block_and_time"]]
    times = _h_axis([h for blocks in by_time for h in blocks])
    columns = [
        [
            _draw_depth(run, depth),
            _draw_shares(run),
            _draw_times(run, times) if run["has_times"] else None,
            _draw_classes(run) if "classes" in run["steps"][-1] else None,
        ]
        for run in runs
    ]
    rows = [row for row in zip(*columns, strict=True) if any(row)]
    figure = render(Figure(rows, (4.4 * len(runs) + 0.6, 3.1 * len(rows) + 0.3)))
    handles = [Patch(color=color, label=LABELS[source]) for color, source in zip(COLORS, SOURCES, strict=False)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4 if len(runs) > 1 else 2, frameon=False)
    return figure


def _h_axis(values: Sequence[float]) -> Axis:
    """An axis with room for these values, the same for all runs."""
    low, high = min(values, default=0), max(values, default=1)
    room = 0.05 * (high - low)
    return Axis("attention map h", low=low and low - room, high=high + room)


def _draw_depth(run: Record, y: Axis) -> Panel:
    steps = run["steps"]
    last = len(steps) - 1
    items: list[Item] = []
    for index, step in enumerate(steps):
        label, band = "", {}
        if index in (0, last):
            label, band = f"step {step['step']:,}", {"low": step["low_by_block"], "high": step["high_by_block"]}
        means, color = step["mean_by_block"], _color("viridis_r", 0.1 + 0.9 * index / max(last, 1))
        items.append(Series(range(len(means)), means, label, color=color, **band))
    x = block_axis(_names(run), f"block (band: {RANGE[0]}-{RANGE[1]} % of channels)")
    return Panel([*items, *_stage_ends(run)], run["run"], x, y)


def _draw_shares(run: Record) -> Panel:
    steps = run["steps"]
    heights = np.array([[step["shares"][source] for step in steps] for source in SOURCES])
    below = heights.cumsum(axis=0) - heights
    pairs = zip(heights.tolist(), below.tolist(), strict=True)
    bars = [Bars(range(len(steps)), height, "", index, low) for index, (height, low) in enumerate(pairs)]
    shown = range(0, len(steps), max(1, len(steps) // 4))
    ticks: dict[float, str] = {index: f"{steps[index]['step']:,}" for index in shown}
    y = Axis("share of the variance of h", low=0, high=1, grid=False)
    return Panel(bars, "", Axis("step", ticks=ticks, grid=False), y)


def _draw_times(run: Record, y: Axis) -> Panel:
    step, names = run["steps"][-1], _names(run)
    blocks = step["mean_by_block_and_time"]
    times = [(index + 0.5) / len(blocks[0]) for index in range(len(blocks[0]))]
    labeled = {0, len(blocks) - 1} if len(blocks) > 14 else set(range(len(blocks)))
    lines = []
    for index, means in enumerate(blocks):
        color = _color("plasma", 0.9 * index / max(len(blocks) - 1, 1))
        lines.append(Series(times, means, names[index] if index in labeled else "", color=color, markers=False))
    return Panel(lines, "", Axis(f"time (0: image, 1: noise), step {step['step']:,}", low=0, high=1), y)


def _draw_classes(run: Record) -> Panel:
    """Each class's mean h minus that of all images, by block; of many classes, only the most frequent."""
    classes = run["steps"][-1]["classes"]
    shown = sorted(sorted(range(len(classes["names"])), key=lambda c: -classes["counts"][c])[:MAX_CLASSES])
    values = 1000 * np.array(classes["deviation_by_class_and_block"])[shown]
    largest = float(np.abs(values).max()) or 1.0
    heat = HeatMap(values, -largest, largest, "RdBu_r", bar="class mean of h minus overall mean, 10⁻³")
    adjusted = "" if classes["adjusted"] is None else f"\n(adjusted for chance {classes['adjusted']:.1%})"
    title = f"classes explain {classes['share']:.1%} of the variance over images{adjusted}"
    y = Axis(ticks={row: classes["names"][c] for row, c in enumerate(shown)}, grid=False)
    return Panel([heat, *_stage_ends(run)], title, block_axis(_names(run)), y)


def _color(colormap: str, place: float) -> str:
    return matplotlib.colors.to_hex(matplotlib.colormaps[colormap](place))


def _names(run: Record) -> list[str]:
    return [block for stage in run["stages"] for block in stage["blocks"]]


def _stage_ends(run: Record) -> list[Level]:
    """A line between stages."""
    ends = np.cumsum([len(stage["blocks"]) for stage in run["stages"]])[:-1]
    return [Level(end - 0.5, "", "x") for end in ends.tolist()]


ANALYSIS = Analysis(_measure, draw, describe, _about)
