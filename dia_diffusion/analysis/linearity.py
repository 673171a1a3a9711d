"""How linear a trained model's MLPs are: a straight line replaces the GELU of each hidden unit.

For a hidden unit with input x and output y = GELU(x), least squares over images, times and tokens gives

    y ~ a + b x,   b = Cov(x, y) / Var(x),   a = E y - b E x,   explained variance: Cov(x, y)^2 / Var(x)

A block's share is the explained variance summed over its hidden units, divided by the sum of their variances Var(y). If
it is 1, the two layers of the MLP are one linear map.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dia_diffusion.analysis.ablations import compared, losses, rise, rise_axis
from dia_diffusion.analysis.ablations import describe as describe_losses
from dia_diffusion.analysis.analysis import Analysis, Record
from dia_diffusion.analysis.run import Coverage, TrainedRun
from dia_diffusion.analysis.stages import uvit_blocks
from dia_diffusion.errors import InputError
from dia_diffusion.figures import Axis, Figure, Panel, Series, block_axis, images_axis
from dia_diffusion.models.uvit import UViT
from dia_diffusion.models.uvit_blocks import Mlp

Activation = Callable[[int, Tensor, Tensor], Tensor | None]


@contextmanager
def at_activations(model: UViT, called: Activation) -> Iterator[None]:
    """Inside the context, called(block, x, y) runs after each block's GELU with its input and output (B, L, H).

    If it returns a tensor, the MLP's second layer gets that instead of y.
    """
    hooks = [hook for index, block in enumerate(uvit_blocks(model)) for hook in _hooks(block.mlp, index, called)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hooks(mlp: Mlp, block: int, called: Activation) -> list[torch.utils.hooks.RemovableHandle]:
    inputs: list[Tensor] = []

    def keep(layer: nn.Module, given: Any, x: Tensor) -> None:
        inputs.append(x)

    def pass_on(layer: nn.Module, given: tuple[Tensor]) -> Tensor | None:
        return called(block, inputs.pop(), given[0])

    return [mlp.fc1.register_forward_hook(keep), mlp.fc2.register_forward_pre_hook(pass_on)]


class LineFit:
    """A least-squares line for each hidden unit of each block, from sums, so memory doesn't grow with images."""

    def __init__(self, model: UViT):
        mlps = [block.mlp for block in uvit_blocks(model)]
        self.counts = torch.zeros(len(mlps), 1, dtype=torch.float64)
        self.sums = torch.zeros(5, len(mlps), mlps[0].fc1.out_features, dtype=torch.float64)

    def add(self, block: int, x: Tensor, y: Tensor) -> None:
        """Adds inputs and outputs (B, L, H) of a block's GELU."""
        x, y = (values.double().flatten(0, 1) for values in (x, y))  # (B L, H)
        self.counts[block] += len(x)
        self.sums[:, block] += torch.stack([v.sum(0) for v in (x, y, x * x, x * y, y * y)]).cpu()

    def lines(self) -> tuple[Tensor, Tensor]:
        """Intercepts and slopes, float32, (blocks, H) each."""
        mean_x, mean_y, var_x, covariance, _ = self._moments()
        slope = torch.where(var_x > 0, covariance / var_x, 0.0)
        return (mean_y - slope * mean_x).float(), slope.float()

    def summary(self) -> dict[str, Any]:
        """For a record: the explained share, in total and by block, and the deviation of GELU's input by block."""
        _, _, var_x, covariance, var_y = self._moments()
        explained = torch.where(var_x > 0, covariance**2 / var_x, 0.0)
        return {
            "explained": float(explained.sum() / var_y.sum()),
            "explained_by_block": (explained.sum(1) / var_y.sum(1)).tolist(),
            "input_deviation_by_block": var_x.mean(1).sqrt().tolist(),
        }

    def _moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        x, y, xx, xy, yy = self.sums / self.counts
        return x, y, (xx - x * x).clamp(min=0), xy - x * y, (yy - y * y).clamp(min=0)


def lines_instead(intercepts: Tensor, slopes: Tensor) -> Activation:
    """For `at_activations`: replaces GELU by a line per hidden unit; intercepts and slopes are (blocks, H)."""
    return lambda block, x, y: intercepts[block].to(x) + slopes[block].to(x) * x


def _measure(run: TrainedRun, model: nn.Module, coverage: Coverage) -> Record:
    """Fits lines on the drawn images and measures losses on an equal number of other images, at the same times."""
    if not isinstance(model, UViT):
        raise InputError(f"the network of {run.folder.path} must be a UViT, got a {type(model).__name__}")
    fit = LineFit(model)
    with at_activations(model, fit.add):
        losses(run, model, run.draw(coverage.seed, 0, coverage.num_images), coverage)
    draws = run.draw(coverage.seed, 1, coverage.num_images)
    own = losses(run, model, draws, coverage)
    with at_activations(model, lines_instead(*fit.lines())):
        lines = losses(run, model, draws, coverage)
    return {**fit.summary(), "losses": compared(own, {"lines for GELU": lines})}


def describe(record: Record) -> Iterator[str]:
    """At the last step: the loss with lines, the share of each block's GELU they explain, its input's deviation."""
    yield from describe_losses(record)
    last = record["steps"][-1]
    by_block = " ".join(f"{share:.1%}" for share in last["explained_by_block"])
    deviations = " ".join(f"{deviation:.3f}" for deviation in last["input_deviation_by_block"])
    yield f"  by block: lines explain {by_block} of GELU's variance; deviation of its input {deviations}"


# ---- figure


def draw(runs: Sequence[Record]) -> Figure:
    """The share of GELU that lines explain, by block at the end and over training; its input; the loss with lines."""
    by_block, deviations, explained, rises = [], [], [], []
    for index, run in enumerate(runs):
        last, seen = run["steps"][-1], [step["images_seen"] for step in run["steps"]]
        blocks = range(len(last["explained_by_block"]))
        by_block.append(Series(blocks, last["explained_by_block"], run["run"], index))
        deviations.append(Series(blocks, last["input_deviation_by_block"], "", index))
        explained.append(Series(seen, [step["explained"] for step in run["steps"]], "", index))
        rises.append(rise(run["steps"], "lines for GELU", index))
    block, share = block_axis([str(index + 1) for index in blocks]), Axis(low=0, high=1.02)
    rows = [
        [
            Panel(by_block, "share of GELU's variance that lines explain, last step", block, share),
            Panel(deviations, "deviation of GELU's input, last step", block, Axis(low=0)),
        ],
        [
            Panel(explained, "the share in all blocks together", images_axis(), share),
            Panel(rises, "loss with lines for GELU: % higher (bars: 2 s.e.)", images_axis(), rise_axis("", rises)),
        ],
    ]
    return Figure(rows, (10.4, 7.6), "below")


ANALYSIS = Analysis(
    _measure,
    draw,
    describe,
    choose_steps=TrainedRun.choose_steps,
    needs_unit=False,
    passes=3,  # the fit, GELU itself, lines
    held_out=True,
)
