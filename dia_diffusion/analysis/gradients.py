"""How large the gradients are at each block (Fig. 13): |dL/dx| for the elements x of the blocks' outputs.

L is the mean training loss of a batch of the run's own size, with the network in training mode. The paper shows the
distributions at the outputs of stages, for networks without skip connections; here they are measured at every block's
output, and a run without skips needs its own recipe. Gradients span many orders of magnitude, so their histogram is
over log10 |g|, and quantiles are read from it with the accuracy of a bin (2.3 %). Elements with zero gradient, such as
those of the last block's time token, are counted; only the mean and deviation include them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dia_diffusion.analysis.analysis import Analysis, Record, quantiles
from dia_diffusion.analysis.run import GradientBatches, TrainedRun
from dia_diffusion.analysis.stages import stages_of
from dia_diffusion.figures import Area, Axis, Figure, Item, Panel, Series

LOWEST, HIGHEST, BINS_PER_DECADE = -20, 10, 100  # of log10 |g|
RECORDED_BINS_PER_DECADE = 20  # enough for a figure


class Magnitudes:
    """The distribution of |g| over elements, from sums and a histogram, in constant memory."""

    def __init__(self) -> None:
        self.count = self.zeros = self.not_finite = 0
        self.sum = self.squares = 0.0
        self.histogram = np.zeros((HIGHEST - LOWEST) * BINS_PER_DECADE, dtype=np.int64)

    def add(self, gradient: Tensor) -> None:
        """Adds elements of any shape. Those that aren't finite are counted and left out."""
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
        """For a record: mean and deviation of |g|; quantiles and the nonempty part of the histogram of nonzero |g|."""
        mean = self.sum / self.count if self.count else None
        logs = quantiles(self.histogram, LOWEST, HIGHEST)
        recorded = self.histogram.reshape(-1, BINS_PER_DECADE // RECORDED_BINS_PER_DECADE).sum(axis=1)
        filled = np.flatnonzero(recorded)
        first, last = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 0)
        return {
            "elements": self.count,
            "zeros": self.zeros,
            "not_finite": self.not_finite,
            "mean": mean,
            "deviation": None if mean is None else max(0.0, self.squares / self.count - mean**2) ** 0.5,
            "quantiles": None if logs is None else {q: 10**value for q, value in logs.items()},
            "histogram": {
                "lowest": LOWEST + first / RECORDED_BINS_PER_DECADE,
                "bins_a_decade": RECORDED_BINS_PER_DECADE,
                "counts": recorded[first:last].tolist(),
            },
        }


@contextmanager
def gradients_at(modules: Sequence[nn.Module], called: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Inside the context, a backward pass calls called(index, gradient) with the gradient at each module's output."""

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
    """A record per block in order of execution: its name and stage, whether it ends the stage, and its gradients."""
    model.requires_grad_(True).train()
    stages = stages_of(model)
    blocks = [(stage.name, name, name == stage.blocks[-1]) for stage in stages for name in stage.blocks]
    magnitudes = [Magnitudes() for _ in blocks]
    outputs = [output for stage in stages for output in stage.outputs]
    with (
        gradients_at(outputs, lambda index, gradient: magnitudes[index].add(gradient)),
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(over.seed)  # for dropout
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


def draw(runs: Sequence[Record]) -> Figure:
    """The distribution of log10 |g| at each block, runs side by side, at each run's first and last measured steps.

    Networks with several stages show the last block of each, as in Fig. 13; networks with one stage show all blocks.
    """
    rows = [0, -1] if all(len(run["steps"]) > 1 for run in runs) else [-1]
    blocks = max((_shown(run["steps"][-1]["blocks"]) for run in runs), key=len)
    names: dict[float, str] = {place: block["stage"] or block["block"] for place, block in enumerate(blocks)}
    x = Axis("output of the " + ("stage" if blocks[0]["stage"] else "block"), ticks=names, grid=False)
    width = 1 / (len(runs) + 0.6)  # of a run's violins
    panels = []
    for row in rows:
        violins: list[Item] = []
        for index, run in enumerate(runs):
            for place, block in enumerate(_shown(run["steps"][row]["blocks"])):
                center = place + (index - (len(runs) - 1) / 2) * width
                violins += _draw_violin(center, block, 0.42 * width, index, run["run"])
        low = min((end for item in violins if isinstance(item, Series) for end in item.low or () if end), default=None)
        steps = ", ".join(f"{step:,}" for step in sorted({run["steps"][row]["step"] for run in runs}))
        # Nearly all elements are in view.
        y = Axis("log₁₀ |gradient|", low=None if low is None else low - 1.5)
        panels.append([Panel(violins, f"step {steps} (line: 5-95 %, dot: median)", x, y)])
    return Figure(panels, (max(7.0, 1.0 + 0.42 * len(blocks) * (len(runs) + 1)), 3.5 * len(rows) + 0.6), "below")


def _shown(blocks: Sequence[Record]) -> list[Record]:
    several = len({block["stage"] for block in blocks}) > 1
    return [block for block in blocks if block["ends_stage"] or not several]


def _draw_violin(place: float, block: Record, width: float, style: int, label: str) -> list[Item]:
    """The histogram to both sides, with a line from the 5 % to the 95 % quantile and a dot at the median."""
    histogram, merged = block["histogram"], 2  # bins
    counts = np.array(histogram["counts"])
    if not len(counts):
        return []
    counts = np.pad(counts, (0, -len(counts) % merged)).reshape(-1, merged).sum(axis=1)
    centers = histogram["lowest"] + (np.arange(len(counts)) + 0.5) * merged / histogram["bins_a_decade"]
    sides = width * counts / counts.max()
    x, y = np.concatenate([place - sides, (place + sides)[::-1]]), np.concatenate([centers, centers[::-1]])
    low, middle, high = (float(np.log10(block["quantiles"][q])) for q in ("0.05", "0.5", "0.95"))
    return [
        Area(x.tolist(), y.tolist(), label, style, opacity=0.45),
        Series([place], [middle], "", style, low=[low], high=[high], lines=False),
    ]


ANALYSIS = Analysis(
    _measure,
    draw,
    describe,
    about=lambda run, over: {"measured_batch_size": over.size(run)},
    choose_steps=partial(TrainedRun.with_first, in_training=True),
    needs_unit=False,
)
