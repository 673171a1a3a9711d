"""What of the attention map h a trained model needs: its loss with h replaced by what h is on average.

A mean over images can't know the image any more; one over times nor the time, one over channels nor the channel. The
network itself stays: it was trained with its own h, so this tells what it uses, not what it could do without.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from dia_diffusion.analysis.analysis import Analysis, Record
from dia_diffusion.analysis.attention_maps import MapMoments, measure_maps
from dia_diffusion.analysis.drawing import over_training, percent, save, style
from dia_diffusion.analysis.run import Coverage, TrainedRun
from dia_diffusion.analysis.stages import attended_stages
from dia_diffusion.attention.layers import recalibrate

# what h still depends on -> the axes of its mean over images (L, T, N) that it is averaged over as well
REPLACEMENTS: dict[str, tuple[int, ...]] = {
    "h by block, time, channel": (),
    "h by block, channel": (1,),
    "h by block, time": (2,),
    "h by block": (1, 2),
}


def replacement(moments: MapMoments, axes: tuple[int, ...]) -> Tensor:
    """The map (T, L, N), float32, in h's place: its mean over images and over these axes of (L, T, N)."""
    mean = moments.mean.mean(axis=axes, keepdims=True)
    return torch.from_numpy(np.broadcast_to(mean, moments.mean.shape).copy()).float().transpose(0, 1)


@contextmanager
def replaced_maps(units: Sequence[nn.Module], maps: Sequence[Tensor]) -> Iterator[None]:
    """While it lasts, each unit multiplies the features in each of its blocks with a row of its (L, N) instead of h."""
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
    """The run's own loss (T, I), float64, of each image of the draws with its noise at each of the T covered times.

    during: what is replaced while the network runs at the time of that index.
    """
    measured = torch.empty(run.num_times(coverage.num_times), len(draws.indices), dtype=torch.float64)
    for batch in run.batches(draws, coverage):
        with during(batch.time):
            measured[batch.time, batch.images] = batch.losses(model).cpu().double()
    return measured


def compared(own: Tensor, replaced: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """For a record: the mean of each name's losses (T, I), and its difference to `own`, with standard errors.

    An image's loss is its mean over times. Errors are those of a mean over images: the difference is taken image by
    image, so its error is far smaller than the losses'.
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
    """The means are those of the drawn images, the losses those of as many others, at the same times."""
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


def draw(runs: Sequence[dict[str, Any]], path: str | Path) -> None:
    """A column a run: the loss with h and with each replacement over training, and how much higher that is."""
    figure = Figure(figsize=(4.4 * len(runs) + 0.6, 7.4), layout="constrained")
    axes = figure.subplots(2, len(runs), squeeze=False, sharey="row")
    for column, run in enumerate(runs):
        loss, rise = axes[:, column]
        loss.set_title(run["run"])
        names = list(run["steps"][-1]["losses"])
        for index, name in enumerate(names):
            line = {**style(index), "label": "h itself" if name == "own" else name}
            _draw_losses(loss, run["steps"], name, line)
            if name != "own":
                draw_rise(rise, run["steps"], name, line)
    for place in axes.flat:
        over_training(place)
    axes[0, 0].set_ylabel("loss")
    axes[0, 0].set_ylim(bottom=0)  # shared, so only once all columns are drawn
    axes[1, 0].set_ylabel("higher than with h itself, % (bars: 2 s.e.)")
    for place in axes[1]:
        percent(place)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if len(runs) == 1 else 5, frameon=False)
    save(figure, path)


def _draw_losses(axes: Axes, steps: Sequence[dict[str, Any]], name: str, line: dict[str, Any]) -> None:
    axes.plot([step["images_seen"] for step in steps], [step["losses"][name]["loss"] for step in steps], **line)


def draw_rise(axes: Axes, steps: Sequence[dict[str, Any]], name: str, line: dict[str, Any]) -> None:
    """How much higher than its own the loss is with a replacement, in per cent, with two standard errors."""
    seen = [step["images_seen"] for step in steps]
    own = [step["losses"]["own"]["loss"] for step in steps]
    rises, errors = (
        [100 * step["losses"][name][key] / loss for step, loss in zip(steps, own, strict=True)]
        for key in ("difference", "difference_error")
    )
    axes.errorbar(seen, rises, yerr=[2 * error for error in errors], **line)


ANALYSIS = Analysis(
    _measure,
    draw,
    describe,
    choose_steps=TrainedRun.choose_steps,
    passes=2 + len(REPLACEMENTS),  # the means, h itself, its replacements
    held_out=True,
)
