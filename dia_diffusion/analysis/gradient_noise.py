"""How noisy a batch's gradient is: McCandlish et al. 2018 (arXiv 1812.06162), and the norms that training logged.

With K batches of B images at the same weights, gradients g_k and their mean m:

    S = 1/(K - 1) sum |g_k - m|^2          the trace of a batch gradient's covariance
    tr(Sigma) = B S                        that of one image's gradient
    |G|^2 = |m|^2 - S / K                  the squared norm of the true gradient; both estimates are unbiased
    noise scale = tr(Sigma) / |G|^2        images: the batch size at which noise and gradient are equal (eq. 2.9)
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from dia_diffusion.analysis.analysis import Analysis, Record
from dia_diffusion.analysis.drawing import over_training, save, style
from dia_diffusion.analysis.run import GradientBatches, TrainedRun
from dia_diffusion.models.attach import UNITS_NAME
from dia_diffusion.training.run_folder import read_metrics

GROUPS = ("all", "unit", "MLPs", "attention", "norms", "others")
FOLDS = 8
WINDOWS = 12  # of the norms that training logged
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def group_of(name: str, owner: nn.Module | None = None) -> str:
    """The group that a network's parameter of that name belongs to; owner: the module whose own it is."""
    parts = set(name.split("."))
    if parts & {"unit", UNITS_NAME}:
        return "unit"
    if isinstance(owner, NORMS) or any(part.startswith("norm") for part in parts):
        return "norms"
    if parts & {"mlp", "ff"}:
        return "MLPs"
    return "attention" if parts & {"attn", "attn1", "attentions", "self_attention"} else "others"


def gradient_noise(model: nn.Module, losses: Sequence[Callable[[], Tensor]], batch_size: int) -> dict[str, Any]:
    """group -> its record, from the gradients of several batches' losses at the model's weights, which stay.

    losses: one function a batch, two or more, each giving the mean loss of batch_size images.

    A record has `parameters`, `batch_gradient_norm` (root mean square over batches), `covariance_trace` (of one image's
    gradient), `squared_gradient_norm` (|G|^2) with its `standard_error` (jackknife over FOLDS parts of the batches),
    `noise_scale`, and `noise_scale_low` and `noise_scale_high`, where |G|^2 is two standard errors more and less. A
    noise scale whose |G|^2 is not above 0 is None: the batches are too few to tell. Memory: FOLDS values a parameter.
    """
    named = [
        (group_of(name, model.get_submodule(name.rpartition(".")[0])), parameter)
        for name, parameter in model.named_parameters()
    ]
    groups = [group for group in GROUPS[1:] if any(group == own for own, _ in named)]
    folds = min(FOLDS, len(losses))
    sums = [torch.zeros(folds, *parameter.shape, dtype=parameter.dtype) for _, parameter in named]
    squares = {group: torch.zeros(folds, dtype=torch.float64) for group in groups}
    for number, loss in enumerate(losses):
        model.zero_grad()
        loss().backward()
        fold = number % folds
        for (group, parameter), total in zip(named, sums, strict=True):
            if parameter.grad is not None:
                gradient = parameter.grad.cpu()
                total[fold] += gradient
                squares[group][fold] += gradient.double().square().sum()
    model.zero_grad()
    products = {group: torch.zeros(folds, folds, dtype=torch.float64) for group in groups}  # of the folds' sums
    sizes = dict.fromkeys(groups, 0)
    for (group, parameter), total in zip(named, sums, strict=True):
        flat = total.flatten(1).double()
        products[group] += flat @ flat.T
        sizes[group] += parameter.numel()
    squares["all"] = torch.stack(list(squares.values())).sum(0)
    products["all"] = torch.stack(list(products.values())).sum(0)
    sizes["all"] = sum(sizes.values())
    counts = torch.tensor([len(range(fold, len(losses), folds)) for fold in range(folds)], dtype=torch.float64)
    return {
        group: {"parameters": sizes[group]} | _record(squares[group], products[group], counts, batch_size)
        for group in ("all", *groups)
    }


def _record(squares: Tensor, products: Tensor, counts: Tensor, batch_size: int) -> dict[str, float | None]:
    """From the folds' sums of |g_k|^2 (F,), the products of their sums of g_k (F, F) and their batches (F,)."""
    trace, squared_norm = _estimates(squares, products, counts)
    kept = [[other for other in range(len(counts)) if other != fold] for fold in range(len(counts))]
    left = torch.tensor([_estimates(squares[k], products[k][:, k], counts[k])[1] for k in kept if counts[k].sum() > 1])
    error = float(((len(left) - 1) * left.var(correction=0)).sqrt()) if len(left) > 1 else math.inf

    def scale(squared: float) -> float | None:
        return batch_size * trace / squared if squared > 0 else None

    return {
        "batch_gradient_norm": math.sqrt(float(squares.sum() / counts.sum())),
        "covariance_trace": batch_size * trace,
        "squared_gradient_norm": squared_norm,
        "standard_error": error if math.isfinite(error) else None,
        "noise_scale": scale(squared_norm),
        "noise_scale_low": scale(squared_norm + 2 * error),
        "noise_scale_high": scale(squared_norm - 2 * error),
    }


def _estimates(squares: Tensor, products: Tensor, counts: Tensor) -> tuple[float, float]:
    """S, the trace of a batch gradient's covariance, and |G|^2."""
    count = float(counts.sum())
    squared_mean = float(products.sum()) / count**2
    spread = (float(squares.sum()) - count * squared_mean) / (count - 1)
    return spread, squared_mean - spread / count


def _measure(run: TrainedRun, model: nn.Module, over: GradientBatches) -> Record:
    """The noise in float32 and without dropout."""
    model.requires_grad_(True)

    def loss(number: int) -> Tensor:
        over.progress(1)
        return run.training_losses(model, run.draw(over.seed, number, over.size(run))).mean()

    losses = [partial(loss, number) for number in range(over.num_batches)]
    return {"groups": gradient_noise(model, losses, over.size(run))}


def _about(run: TrainedRun, over: GradientBatches) -> Record:
    lines = read_metrics(run.folder.metrics) if run.folder.metrics.is_file() else []
    return {"measured_batch_size": over.size(run), "logged": logged_norms(lines, WINDOWS)}


def logged_norms(metrics: Sequence[dict[str, Any]], windows: int) -> list[dict[str, float]]:
    """The gradient norms of metrics.jsonl in so many windows of as many lines: mean, and deviation over mean."""
    lines = [line for line in metrics if None not in (line.get("grad_norm"), line.get("loss"))]
    found = []
    for index in range(windows):
        part = lines[index * len(lines) // windows : (index + 1) * len(lines) // windows]
        if len(part) < 2:
            continue
        norms = torch.tensor([line["grad_norm"] for line in part], dtype=torch.float64)
        found.append(
            {
                "first_step": part[0]["step"],
                "last_step": part[-1]["step"],
                "mean": float(norms.mean()),
                "variation": float(norms.std() / norms.mean()),
                "loss": sum(line["loss"] for line in part) / len(part),
            }
        )
    return found


def describe(record: Record) -> Iterator[str]:
    """The noise scale of each group of parameters at the last step, with its range."""
    last = record["steps"][-1]
    groups = ", ".join(f"{name} {_in_words(group)}" for name, group in last["groups"].items())
    yield f"{record['run']}, step {last['step']:,}: noise scale in images: {groups}"


def _in_words(noise: dict[str, float | None]) -> str:
    scale, low, high = (noise[key] for key in ("noise_scale", "noise_scale_low", "noise_scale_high"))
    if scale and low and high:
        return f"{scale:,.0f} [{low:,.0f}, {high:,.0f}]"
    return f"at least {low:,.0f}" if low else "unknown"


# ---- figure


def draw(runs: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Noise scale over training, by group at the end, and the gradient norms that training logged."""
    figure = Figure(figsize=(10.4, 7.6), layout="constrained")
    (scale, by_group), (norms, variation) = figure.subplots(2, 2)
    for index, run in enumerate(runs):
        line = {**style(index), "label": run["run"]}
        seen = [step["images_seen"] for step in run["steps"]]
        _draw_scales(scale, seen, [step["groups"]["all"] for step in run["steps"]], line)
        logged = run["logged"]
        seen = [window["last_step"] * run["batch_size"] for window in logged]
        norms.plot(seen, [window["mean"] for window in logged], **line)
        variation.plot(seen, [window["variation"] for window in logged], **line)
        groups = run["steps"][-1]["groups"]
        places = [place + 0.16 * (index - (len(runs) - 1) / 2) for place, name in enumerate(GROUPS) if name in groups]
        measured = [groups[name] for name in GROUPS if name in groups]
        _draw_scales(by_group, places, measured, {**line, "linestyle": "none"})
    for place, title in (
        (scale, "noise scale tr Σ / |G|², images (↑: at least)"),
        (norms, "gradient norm of a batch, as logged"),
        (variation, "its deviation over its mean"),
    ):
        place.set_title(title)
        over_training(place)
    norms.set_ylim(bottom=0)
    variation.set_ylim(bottom=0)
    by_group.set_title("noise scale by group, last step")
    by_group.set_xticks(range(len(GROUPS)), GROUPS)
    by_group.grid(alpha=0.25, linewidth=0.6, axis="y")
    handles, labels = norms.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(runs)), frameon=False)
    save(figure, path)


def _draw_scales(axes: Axes, places: Sequence[float], noises: Sequence[dict[str, Any]], line: dict[str, Any]) -> None:
    """Noise scales with their ranges; where the range has no upper end, a caret at its lower one."""
    known = [(place, noise) for place, noise in zip(places, noises, strict=True) if noise["noise_scale_high"]]
    axes.plot([place for place, _ in known], [noise["noise_scale"] for _, noise in known], **line)
    for place, noise in known:
        axes.vlines(place, noise["noise_scale_low"], noise["noise_scale_high"], color=line["color"], linewidth=1)
    at_least = [(place, noise["noise_scale_low"]) for place, noise in zip(places, noises, strict=True)]
    at_least = [pair for pair, noise in zip(at_least, noises, strict=True) if not noise["noise_scale_high"] and pair[1]]
    if known or at_least:
        axes.set_yscale("log")
    if at_least:
        axes.plot(*zip(*at_least, strict=True), color=line["color"], marker="$\u2191$", markersize=9, linestyle="none")


ANALYSIS = Analysis(_measure, draw, describe, _about, choose_steps=TrainedRun.choose_steps, needs_unit=False)
