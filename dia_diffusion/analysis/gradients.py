"""How large the gradients are that reach each block (Fig. 13): |dL/dx| of the elements of the blocks' outputs.

L is the mean training loss of a batch of the run's own size, the network in training mode as it would be in that step.
The paper draws the distributions at each stage's output, of networks without skip connections; here they are taken at
every block's output, and a run without skips is a matter of its recipe. Gradients spread over many powers of ten:
their histogram is over log10 |g|, and quantiles are read from it, good to a bin (2.3 %). Elements that no gradient
reaches, such as those of the last block's time token, are counted and left out of it; mean and deviation have them.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

from dia_diffusion.analysis.analysis import Analysis, Record
from dia_diffusion.analysis.drawing import save
from dia_diffusion.analysis.run import GradientBatches, TrainedRun
from dia_diffusion.analysis.stages import stages_of
from dia_diffusion.evaluation.curves import COLOURS

LOWEST, HIGHEST, BINS_A_DECADE = -20, 10, 100  # of log10 |g|
RECORDED_BINS_A_DECADE = 20  # which a figure needs
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Magnitudes:
    """The distribution of |g| over elements, from sums and a histogram; flat in memory."""

    def __init__(self) -> None:
        self.count = self.zeros = self.not_finite = 0
        self.sum = self.squares = 0.0
        self.histogram = np.zeros((HIGHEST - LOWEST) * BINS_A_DECADE, dtype=np.int64)

    def add(self, gradient: Tensor) -> None:
        """More elements, of any shape. Those that aren't finite are counted and left out."""
        size = gradient.detach().double().abs().flatten()
        finite = size[torch.isfinite(size)]
        self.not_finite += len(size) - len(finite)
        self.count += len(finite)
        self.zeros += int((finite == 0).sum())
        self.sum += float(finite.sum())
        self.squares += float(finite.square().sum())
        logarithms = finite[finite > 0].log10().clamp(LOWEST, HIGHEST - 1e-9).cpu().numpy()
        self.histogram += np.histogram(logarithms, bins=len(self.histogram), range=(LOWEST, HIGHEST))[0]

    def summary(self) -> dict[str, Any]:
        """For a record: mean and deviation of |g|, quantiles of those not 0, and the filled part of their histogram."""
        mean = self.sum / self.count if self.count else None
        recorded = self.histogram.reshape(-1, BINS_A_DECADE // RECORDED_BINS_A_DECADE).sum(axis=1)
        filled = np.flatnonzero(recorded)
        first, last = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 0)
        return {
            "elements": self.count,
            "zeros": self.zeros,
            "not_finite": self.not_finite,
            "mean": mean,
            "deviation": None if mean is None else max(0.0, self.squares / self.count - mean**2) ** 0.5,
            "quantiles": self._quantiles(),
            "histogram": {
                "lowest": LOWEST + first / RECORDED_BINS_A_DECADE,
                "bins_a_decade": RECORDED_BINS_A_DECADE,
                "counts": recorded[first:last].tolist(),
            },
        }

    def _quantiles(self) -> dict[str, float] | None:
        if self.count == self.zeros:
            return None
        below = np.concatenate([[0], np.cumsum(self.histogram)]) / (self.count - self.zeros)
        edges = np.linspace(LOWEST, HIGHEST, len(self.histogram) + 1)
        return {str(q): float(10 ** np.interp(q, below, edges)) for q in QUANTILES}


@contextmanager
def gradients_at(modules: Sequence[nn.Module], called: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While it lasts, called(index, gradient) for what a backward pass brings to each module's output."""

    def keep(index: int, module: nn.Module, given: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        tensor.register_hook(partial(called, index))

    hooks = [module.register_forward_hook(partial(keep, index)) for index, module in enumerate(modules)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _measure(run: TrainedRun, model: nn.Module, over: GradientBatches) -> Record:
    """A record per block in order of execution: its name, its stage's, whether it ends the stage, and its gradients."""
    model = copy.deepcopy(model).requires_grad_(True).train()  # BatchNorm's statistics move in training mode
    stages = stages_of(model)
    blocks = [(stage.name, name, name == stage.blocks[-1]) for stage in stages for name in stage.blocks]
    magnitudes = [Magnitudes() for _ in blocks]
    outputs = [output for stage in stages for output in stage.outputs]
    with (
        gradients_at(outputs, lambda index, gradient: magnitudes[index].add(gradient)),
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(over.seed)  # of dropout, where there is any
        for number in range(over.num_batches):
            run.training_losses(model, run.draw(over.seed, number, over.size(run))).mean().backward()
            model.zero_grad()
            over.progress(1)
    records = [
        {"stage": stage, "block": name, "ends_stage": ends, **each.summary()}
        for (stage, name, ends), each in zip(blocks, magnitudes, strict=True)
    ]
    return {"blocks": records}


def describe(record: Record) -> Iterator[str]:
    """The mean, deviation and median of each block's gradients at the last step."""
    last = record["steps"][-1]
    yield f"{record['run']}, step {last['step']:,}: |gradient|, mean (deviation), median"
    for block in last["blocks"]:
        if block["quantiles"] is not None:
            name = f"{block['stage']} {block['block']}".strip()
            yield f"  {name}: {block['mean']:.3g} ({block['deviation']:.3g}), {block['quantiles']['0.5']:.3g}"


# ---- figure


def draw(runs: Sequence[dict[str, Any]], path: str | Path) -> None:
    """The distribution of log10 |g| at each block, runs side by side, for the first step in common and each one's last.

    Of networks of several stages the blocks that end them, as in Fig. 13; of one stage all blocks.
    """
    rows = [0, -1] if all(len(run["steps"]) > 1 for run in runs) else [-1]
    blocks = max((_shown(run["steps"][-1]["blocks"]) for run in runs), key=len)
    width = max(7.0, 1.0 + 0.42 * len(blocks) * (len(runs) + 1))
    figure = Figure(figsize=(width, 3.5 * len(rows) + 0.6), layout="constrained")
    for axes, row in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        for index, run in enumerate(runs):
            _draw_violins(axes, _shown(run["steps"][row]["blocks"]), index, len(runs))
        axes.set_xticks(range(len(blocks)), [block["stage"] or block["block"] for block in blocks])
        axes.set_xlabel("output of the " + ("stage" if blocks[0]["stage"] else "block"))
        axes.set_ylabel(r"$\log_{10}$ |gradient|")
        axes.grid(alpha=0.25, linewidth=0.6, axis="y")
        steps = sorted({run["steps"][row]["step"] for run in runs})
        axes.set_title(f"step {', '.join(f'{step:,}' for step in steps)} (line: 5-95 %, dot: median)")
    handles = [
        Patch(color=COLOURS[index % len(COLOURS)], alpha=0.5, label=run["run"]) for index, run in enumerate(runs)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(runs)), frameon=False)
    save(figure, path, dpi=130)


def _draw_violins(axes: Axes, blocks: Sequence[dict[str, Any]], index: int, runs: int) -> None:
    """A run's blocks, its place among so many runs; with nearly all elements in view."""
    width = 1 / (runs + 0.6)
    for place, block in enumerate(blocks):
        if block["quantiles"] is not None:
            offset = (index - (runs - 1) / 2) * width
            _draw_violin(axes, place + offset, block, 0.42 * width, COLOURS[index % len(COLOURS)])
            lowest = np.log10(block["quantiles"]["0.05"]) - 1.5
            bottom = axes.get_ylim()[0] if place + index else lowest
            axes.set_ylim(bottom=min(bottom, lowest))


def _shown(blocks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    several = len({block["stage"] for block in blocks}) > 1
    return [block for block in blocks if block["ends_stage"] or not several]


def _draw_violin(axes: Axes, place: float, block: dict[str, Any], width: float, colour: str) -> None:
    """The histogram to both sides, with a line from the 5 % to the 95 % quantile and a dot at the median."""
    histogram, together = block["histogram"], 2
    counts = np.array(histogram["counts"])
    if not len(counts):
        return
    counts = np.pad(counts, (0, -len(counts) % together)).reshape(-1, together).sum(axis=1)
    centres = histogram["lowest"] + (np.arange(len(counts)) + 0.5) * together / histogram["bins_a_decade"]
    sides = width * counts / counts.max()
    axes.fill_betweenx(centres, place - sides, place + sides, color=colour, alpha=0.45, linewidth=0)
    low, middle, high = (np.log10(block["quantiles"][q]) for q in ("0.05", "0.5", "0.95"))
    axes.vlines(place, low, high, color=colour, linewidth=1.2)
    axes.plot(place, middle, "o", color=colour, markersize=4)


ANALYSIS = Analysis(
    _measure,
    draw,
    describe,
    about=lambda run, over: {"measured_batch_size": over.size(run)},
    choose_steps=partial(TrainedRun.with_first, in_training=True),
    needs_unit=False,
)
