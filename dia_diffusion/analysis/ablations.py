"""Which dependences of the attention map h a trained model needs: its loss with h replaced by averages of h.

A mean over images no longer depends on the image; if it is also taken over times or channels, it doesn't depend on
those either. The network is not retrained: this shows what it uses of its own h, not what it could do without.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dia_diffusion.analysis.analysis import Analysis, Record
from dia_diffusion.analysis.attention_maps import MapMoments, measure_maps
from dia_diffusion.analysis.run import Coverage, TrainedRun
from dia_diffusion.analysis.stages import attended_stages
from dia_diffusion.attention.layers import recalibrate
from dia_diffusion.figures import Axis, Figure, Panel, Series, images_axis

# what h still depends on -> the axes of its mean over images (L, T, N) that are averaged too
REPLACEMENTS: dict[str, tuple[int, ...]] = {
    "h by block, time, channel": (),
    "h by block, channel": (1,),
    "h by block, time": (2,),
    "h by block": (1, 2),
}


def replacement(moments: MapMoments, axes: tuple[int, ...]) -> Tensor:
    """The map (T, L, N), float32, that replaces h: its mean over images and over these axes of (L, T, N)."""
    mean = moments.mean.mean(axis=axes, keepdims=True)
    return torch.from_numpy(np.broadcast_to(mean, moments.mean.shape).copy()).float().transpose(0, 1)


@contextmanager
def replaced_maps(units: Sequence[nn.Module], maps: Sequence[Tensor]) -> Iterator[None]:
    """Inside the context, each unit multiplies the features of its L blocks by the rows of its map (L, N), not by h."""
    with ExitStack() as hooks:
        for unit, rows in zip(units, maps, strict=True):
            hooks.callback(unit.register_forward_hook(partial(_replace, cycle(rows))).remove)
        yield


def _replace(
    rows: Iterator[Tensor], unit: nn.Module, given: tuple[Any, ...], output: tuple[Tensor, Any]
) -> tuple[Tensor, Any]:
    features = given[0]
    return recalibrate(features, next(rows).to(features)), output[1]


@torch.no_grad()
def losses(
    run: TrainedRun,
    model: nn.Module,
    draws: Any,
    coverage: Coverage,
    during: Callable[[int], AbstractContextManager[object]] = lambda time: nullcontext(),
) -> Tensor:
    """The training loss (T, I), float64, of each drawn image with its noise at each of the T covered times.

    during: index of a time -> the context in which the network runs at that time.
    """
    measured = torch.empty(run.num_times(coverage.num_times), len(draws.indices), dtype=torch.float64)
    for batch in run.batches(draws, coverage):
        with during(batch.time):
            measured[batch.time, batch.images] = batch.losses(model).cpu().double()
    return measured


def compared(own: Tensor, replaced: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """For a record: the mean of each named loss (T, I), and its difference from `own`, with standard errors.

    An image's loss is its mean over times; standard errors are over images. Differences are taken image by image, so
    their errors are far smaller than the errors of the losses.
    """
    before = own.mean(0)
    record = {}
    for name, each in {"own": own, **replaced}.items():
        by_image = each.mean(0)
        loss, error = _mean(by_image)
        difference, difference_error = _mean(by_image - before)
        record[name] = {
            "loss": loss,
            "standard_error": error,
            "difference": difference,
            "difference_error": difference_error,
        }
    return record


def _mean(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def _measure(run: TrainedRun, model: nn.Module, coverage: Coverage) -> Record:
    """Takes means on the drawn images and measures losses on an equal number of other images, at the same times."""
    draws = run.draw(coverage.seed, 1, coverage.num_images)
    units = [stage.unit for stage in attended_stages(model) if stage.unit is not None]
    moments = measure_maps(run, model, coverage)
    own, replaced = losses(run, model, draws, coverage), {}
    for name, axes in REPLACEMENTS.items():
        maps = [replacement(each, axes) for each in moments]

        def during(time: int, maps: list[Tensor] = maps) -> AbstractContextManager[None]:
            return replaced_maps(units, [each[time] for each in maps])

        replaced[name] = losses(run, model, draws, coverage, during)
    return {"losses": compared(own, replaced)}


def describe(record: Record) -> Iterator[str]:
    """The loss at the last step, and how much higher it is with each replacement."""
    last = record["steps"][-1]
    own = last["losses"]["own"]
    yield f"{record['run']}, step {last['step']:,}: loss {own['loss']:.4f} ± {own['standard_error']:.4f}"
    for name, other in last["losses"].items():
        if name != "own":
            rise, error = other["difference"] / own["loss"], other["difference_error"] / own["loss"]
            yield f"  {name}: {other['loss']:.4f} ({rise:+.2%} ± {error:.2%})"


# ---- figure


def draw(runs: Sequence[Record]) -> Figure:
    """A column per run: the loss over training with h and with each replacement, and the increase in percent."""
    losses: list[list[Series]] = []
    rises: list[list[Series]] = []
    for run in runs:
        seen = [step["images_seen"] for step in run["steps"]]
        names = {name: "h itself" if name == "own" else name for name in run["steps"][-1]["losses"]}
        by_name = {name: [step["losses"][name]["loss"] for step in run["steps"]] for name in names}
        losses.append([Series(seen, by_name[name], label, index) for index, (name, label) in enumerate(names.items())])
        rises.append([rise(run["steps"], name, index) for index, name in enumerate(names) if name != "own"])
    higher = rise_axis("higher than with h itself, % (bars: 2 s.e.)", [series for column in rises for series in column])
    rows = [
        [Panel(s, run["run"], images_axis(), Axis("loss", low=0)) for s, run in zip(losses, runs, strict=True)],
        [Panel(series, "", images_axis(), higher) for series in rises],
    ]
    return Figure(rows, (4.4 * len(runs) + 0.6, 7.4), "below", share_y="row")


def rise(steps: Sequence[Record], name: str, style: int) -> Series:
    """The increase of the loss over the model's own with a replacement, in percent, with two standard errors."""
    own = [step["losses"]["own"]["loss"] for step in steps]
    rises, errors = (
        [100 * step["losses"][name][key] / loss for step, loss in zip(steps, own, strict=True)]
        for key in ("difference", "difference_error")
    )
    low, high = ([rise + side * error for rise, error in zip(rises, errors, strict=True)] for side in (-2, 2))
    return Series([step["images_seen"] for step in steps], rises, "", style, low=low, high=high, bars=True)


def rise_axis(label: str, rises: Sequence[Series]) -> Axis:
    """An axis for percentages from below 1 to above 100: linear near 0, logarithmic beyond."""
    return Axis(label, "symlog", low=min([0.0, *(low for series in rises for low in series.low or () if low)]))


ANALYSIS = Analysis(
    _measure,
    draw,
    describe,
    choose_steps=TrainedRun.choose_steps,
    passes=2 + len(REPLACEMENTS),  # the means, h itself, its replacements
    held_out=True,
)
