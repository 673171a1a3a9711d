"""How noisy a batch's gradient is: McCandlish et al. 2018 (arXiv 1812.06162), and the norms that training logged.

With K batches of B images at the same weights, gradients g_k and their mean m:

    S = 1/(K - 1) sum |g_k - m|^2          the trace of a batch gradient's covariance
    tr(Sigma) = B S                        the same trace for one image's gradient
    |G|^2 = |m|^2 - S / K                  the squared norm of the true gradient; both estimates are unbiased
    noise scale = tr(Sigma) / |G|^2        in images: the batch size at which noise and gradient are equal (eq. 2.9)
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dia_diffusion.analysis.analysis import Analysis, Record
from dia_diffusion.analysis.run import GradientBatches, TrainedRun
from dia_diffusion.figures import COLORS, Axis, Figure, Item, Panel, Series, Text, images_axis
from dia_diffusion.models.attach import UNITS_NAME
from dia_diffusion.training.run_folder import read_metrics

GROUPS = ("all", "unit", "MLPs", "attention", "norms", "others")
FOLDS = 8
WINDOWS = 12  # for the norms that training logged
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def group_of(name: str, owner: nn.Module | None = None) -> str:
    """The group of a network's parameter; owner: the module that it belongs to."""
    parts = set(name.split("."))
    if parts & {"unit", UNITS_NAME}:
        return "unit"
    if isinstance(owner, NORMS) or any(part.startswith("norm") for part in parts):
        return "norms"
    if parts & {"mlp", "ff"}:
        return "MLPs"
    return "attention" if parts & {"attn", "attn1", "attentions", "self_attention"} else "others"


def gradient_noise(model: nn.Module, losses: Sequence[Callable[[], Tensor]], batch_size: int) -> dict[str, Any]:
    """Returns group -> record, from the gradients of several batches' losses. The model's weights don't change.

    losses: one function per batch, two or more, each returning the mean loss of batch_size images.

    A record has `parameters`, `batch_gradient_norm` (root mean square over batches), `covariance_trace` (of one image's
    gradient), `squared_gradient_norm` (|G|^2) with its `standard_error` (jackknife over FOLDS parts of the batches),
    `noise_scale`, and `noise_scale_low` and `noise_scale_high`, with |G|^2 two standard errors higher and lower. A
    noise scale is None if |G|^2 isn't above 0; it then takes more batches. Memory: FOLDS values per parameter.
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
    """From each fold's sum of |g_k|^2 (F,), dot products of the folds' sums of g_k (F, F), and batch counts (F,)."""
    trace, squared_norm = _estimates(squares, products, counts)
    kept = [[other for other in range(len(counts)) if other != fold] for fold in range(len(counts))]
    left = torch.tensor([_estimates(squares[k], products[k][:, k], counts[k])[1] for k in kept if counts[k].sum() > 1])
    error = float(((len(left) - 1) * left.var(correction=0)).sqrt()) if len(left) > 1 else math.inf

    def scale(squared: float) -> float | None:
        return batch_size * trace / squared if 0 < squared < math.inf else None

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
    """Measures the noise in float32 and without dropout."""
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
    """Gradient norms from metrics.jsonl in windows with the same number of lines: mean, and deviation / mean."""
    lines = [line for line in metrics if None not in (line.get("grad_norm"), line.get("loss"))]
    records = []
    for index in range(windows):
        part = lines[index * len(lines) // windows : (index + 1) * len(lines) // windows]
        if len(part) < 2:
            continue
        norms = torch.tensor([line["grad_norm"] for line in part], dtype=torch.float64)
        records.append(
            {
                "first_step": part[0]["step"],
                "last_step": part[-1]["step"],
                "mean": float(norms.mean()),
                "variation": float(norms.std() / norms.mean()),
                "loss": sum(line["loss"] for line in part) / len(part),
            }
        )
    return records


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


def draw(runs: Sequence[Record]) -> Figure:
    """Noise scale over training, by group at the end, and the gradient norms that training logged."""
    scales, by_group, norms, variations = [], [], [], []
    for index, run in enumerate(runs):
        seen = [step["images_seen"] for step in run["steps"]]
        scales += _draw_scales(seen, [step["groups"]["all"] for step in run["steps"]], index)
        logged = [window["last_step"] * run["batch_size"] for window in run["logged"]]
        norms.append(Series(logged, [window["mean"] for window in run["logged"]], run["run"], index))
        variations.append(Series(logged, [window["variation"] for window in run["logged"]], "", index))
        groups, offset = run["steps"][-1]["groups"], 0.16 * (index - (len(runs) - 1) / 2)
        places = {name: place + offset for place, name in enumerate(GROUPS) if name in groups}
        by_group += _draw_scales([*places.values()], [groups[name] for name in places], index, lines=False)
    last = max(step["images_seen"] for run in runs for step in run["steps"])
    names = Axis(low=-0.5, high=len(GROUPS) - 0.5, ticks=dict(enumerate(GROUPS)), grid=False)
    seen_axis = replace(images_axis(), high=1.05 * last)
    rows = [
        [
            Panel(scales, "noise scale tr Σ / |G|², images (↑: at least)", seen_axis, _scale_axis(scales)),
            Panel(by_group, "noise scale by group, last step", names, _scale_axis(by_group)),
        ],
        [
            Panel(norms, "gradient norm of a batch, as logged", images_axis(), Axis(low=0)),
            Panel(variations, "its deviation over its mean", images_axis(), Axis(low=0)),
        ],
    ]
    return Figure(rows, (10.4, 7.6), "below")


def _draw_scales(places: Sequence[float], noises: Sequence[Record], style: int, lines: bool = True) -> list[Item]:
    """Noise scales with their ranges; if a range has no upper end, an arrow at its lower end."""
    pairs = list(zip(places, noises, strict=True))
    known = [(place, noise) for place, noise in pairs if noise["noise_scale_high"]]
    scale, low, high = ([noise[f"noise_scale{end}"] for _, noise in known] for end in ("", "_low", "_high"))
    series = Series([place for place, _ in known], scale, "", style, low=low, high=high, bars=True, lines=lines)
    color = COLORS[style % len(COLORS)]
    arrows = [
        Text(place, noise["noise_scale_low"], "↑", color)
        for place, noise in pairs
        if noise["noise_scale_low"] and not noise["noise_scale_high"]
    ]
    return [series, *arrows]


def _scale_axis(items: Sequence[Item]) -> Axis:
    values = [item.y for item in items if isinstance(item, Text)]
    values += [
        end for item in items if isinstance(item, Series) for end in (*(item.low or ()), *(item.high or ())) if end
    ]
    return Axis("", "log", low=min(values) / 1.2, high=max(values) * 1.2) if values else Axis()


ANALYSIS = Analysis(_measure, draw, describe, _about, choose_steps=TrainedRun.choose_steps, needs_unit=False)
