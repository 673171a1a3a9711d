"""`dia-diffusion analyze`: the analyses of trained runs; each prints the numbers of the last step."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dia_diffusion.analysis import correlation as correlations
from dia_diffusion.analysis import importance as importances
from dia_diffusion.analysis.ablations import REPLACEMENTS, ablations_of_run, draw_ablations
from dia_diffusion.analysis.attention_maps import draw_maps, maps_of_run
from dia_diffusion.analysis.correlation import draw_correlations
from dia_diffusion.analysis.gradient_noise import draw_noise, noise_of_run
from dia_diffusion.analysis.gradients import draw_magnitudes, gradients_of_run
from dia_diffusion.analysis.importance import draw_importances
from dia_diffusion.analysis.linearity import draw_linearity, linearity_of_run
from dia_diffusion.analysis.run import Coverage, TrainedRun, open_runs
from dia_diffusion.cli.analyze import (
    AblationsOptions,
    CorrelationOptions,
    GradientNoiseOptions,
    GradientsOptions,
    ImageOptions,
    ImportanceOptions,
    LinearityOptions,
    MapsOptions,
    RunOptions,
)
from dia_diffusion.cli.console import ConsoleProgress, Counter, console
from dia_diffusion.errors import InputError
from dia_diffusion.io import write_json
from dia_diffusion.training.randomness import RANDOMNESS

Record = dict[str, Any]


def maps(options: MapsOptions) -> None:
    """The attention map h, and what its variance is made of."""

    def passes(run: TrainedRun) -> int:
        run.require_unit()
        return len(run.with_first(options.steps))

    for record in _over_images("maps", options, maps_of_run, passes, draw_maps):
        last = record["steps"][-1]
        shares = ", ".join(f"{name} {share:.1%}" for name, share in last["shares"].items())
        by_block = " ".join(f"{mean:.3f}" for mean in last["mean_by_block"])
        console.print(f"{record['run']}, step {last['step']:,}: h by block {by_block}; variance: {shares}")
        if classes := last.get("classes"):
            adjusted = "" if classes["adjusted"] is None else f", adjusted {classes['adjusted']:.1%}"
            share = f"{classes['share']:.1%} (by chance {classes['share_by_chance']:.1%}{adjusted})"
            console.print(f"  of the variance over images {len(classes['names'])} classes explain {share}")


def correlation(options: CorrelationOptions) -> None:
    """Correlations of the maps of pairs of blocks."""

    def passes(run: TrainedRun) -> int:
        run.require_unit()
        return len(run.with_first(options.steps)) * correlations.PASSES

    measure = correlations.correlations_of_run
    for record in _over_images("correlation", options, measure, passes, draw_correlations):
        last = record["steps"][-1]
        console.print(f"{record['run']}, step {last['step']:,}: {_correlations(last['mean'])}")
        for stage in last["stages"]:
            means = {variant: stage[variant]["mean"] for variant in correlations.VARIANTS}
            undefined = stage["maps"]["undefined"]
            constant = f"; {undefined:,} undefined, of maps with one value in all channels" if undefined else ""
            if stage["name"]:
                console.print(f"  {stage['name']}, {len(stage['blocks'])} blocks: {_correlations(means)}{constant}")
            elif constant:
                console.print(f"  {constant[2:]}")


def _correlations(means: dict[str, float | None]) -> str:
    maps, centered = ("undefined" if mean is None else f"{mean:.3f}" for mean in means.values())
    return f"mean correlation {maps}; less each channel's mean over images {centered}"


def importance(options: ImportanceOptions) -> None:
    """Random forests from earlier blocks' maps to a block's; prints how far back the most important block lies."""

    def measure(run: TrainedRun, steps: list[int] | None, coverage: Coverage) -> Record:
        return importances.importances_of_run(run, steps, coverage, options.samples)

    def passes(run: TrainedRun) -> int:
        run.require_unit()
        return len(importances.last_step(run, options.steps)) * importances.PASSES

    for record in _over_images("importance", options, measure, passes, draw_importances):
        last = record["steps"][-1]
        for stage in last["stages"]:
            named = f", {stage['name']}" if stage["name"] else ""
            console.print(f"{record['run']}{named}, step {last['step']:,}, {stage['samples']:,} samples")
            for variant, title in (("maps", "the maps"), ("centred", "less each channel's mean over images")):
                rows = zip(stage["blocks"][1:], stage[variant], strict=True)
                text = ", ".join(_most_important(name, row, stage["blocks"], record["least_r2"]) for name, row in rows)
                console.print(f"  {title}: {text}")


def _most_important(name: str, row: dict[str, Any], blocks: Sequence[str], least_r2: float) -> str:
    if row["r2"] is None:
        return f"{name} constant"
    if row["r2"] < least_r2:
        return f"{name} not predicted (R² {row['r2']:.2f})"
    first = max(range(len(row["importance"])), key=row["importance"].__getitem__)
    return f"{name} by {blocks[first]} {row['importance'][first]:.0%} (R² {row['r2']:.2f})"


def ablations(options: AblationsOptions) -> None:
    """Losses with h replaced by its means."""

    def passes(run: TrainedRun) -> int:
        run.require_unit()
        return len(run.choose_steps(options.steps)) * (2 + len(REPLACEMENTS))  # the fit, h itself, its replacements

    for record in _over_images("ablations", options, ablations_of_run, passes, draw_ablations):
        _print_losses(record)


def linearity(options: LinearityOptions) -> None:
    """Losses with GELUs replaced by lines, and the share of variance that the lines explain."""

    def passes(run: TrainedRun) -> int:
        return len(run.choose_steps(options.steps)) * 3  # the fit, GELU itself, lines

    for record in _over_images("linearity", options, linearity_of_run, passes, draw_linearity):
        _print_losses(record)
        last = record["steps"][-1]
        by_block = " ".join(f"{share:.1%}" for share in last["explained_by_block"])
        deviations = " ".join(f"{deviation:.3f}" for deviation in last["input_deviation_by_block"])
        console.print(f"  by block: lines explain {by_block} of GELU's variance; deviation of its input {deviations}")


def _print_losses(record: dict[str, Any]) -> None:
    last = record["steps"][-1]
    own = last["losses"]["own"]
    console.print(f"{record['run']}, step {last['step']:,}: loss {own['loss']:.4f} ± {own['standard_error']:.4f}")
    for name, other in last["losses"].items():
        if name != "own":
            rise, error = other["difference"] / own["loss"], other["difference_error"] / own["loss"]
            console.print(f"  {name}: {other['loss']:.4f} ({rise:+.2%} ± {error:.2%})")


def gradients(options: GradientsOptions) -> None:
    """The gradient's magnitude at blocks."""
    steps = partial(TrainedRun.with_first, in_training=True)
    for record in _over_batches("gradients", options, gradients_of_run, steps, draw_magnitudes):
        last = record["steps"][-1]
        console.print(f"{record['run']}, step {last['step']:,}: |gradient|, mean (deviation), median")
        for block in last["blocks"]:
            if block["quantiles"] is not None:
                median = block["quantiles"]["0.5"]
                name = f"{block['stage']} {block['block']}".strip()
                console.print(f"  {name}: {block['mean']:.3g} ({block['deviation']:.3g}), {median:.3g}")


def gradient_noise(options: GradientNoiseOptions) -> None:
    """The gradient noise scale, in images."""
    for record in _over_batches("gradient-noise", options, noise_of_run, TrainedRun.choose_steps, draw_noise):
        last = record["steps"][-1]
        groups = ", ".join(f"{name} {_noise_scale(group)}" for name, group in last["groups"].items())
        console.print(f"{record['run']}, step {last['step']:,}: noise scale in images: {groups}")


def _noise_scale(noise: dict[str, float | None]) -> str:
    scale, low, high = (noise[key] for key in ("noise_scale", "noise_scale_low", "noise_scale_high"))
    if scale and low and high:
        return f"{scale:,.0f} [{low:,.0f}, {high:,.0f}]"
    return f"at least {low:,.0f}" if low else "unknown"


def _over_images(
    name: str,
    options: ImageOptions,
    measure: Callable[[TrainedRun, list[int] | None, Coverage], Record],
    passes: Callable[[TrainedRun], int],
    draw: Callable[[list[Record], Path], None],
) -> list[Record]:
    """The runs' records, written and drawn, of an analysis over the same images and times in each run.

    passes: how often it goes over them in a run; raises InputError for a run it isn't for.
    """
    runs = _open(options)
    if few := next((run for run in runs if len(run.images) < options.images), None):
        where = f"the {len(few.images):,} images of {few.folder.path}"
        raise InputError(f"`--images` must be 2 to {where}, got {options.images}")
    total = sum(passes(run) * run.num_times(options.times) for run in runs) * options.images
    with Counter(f"measuring {name}", "images") as counter:
        coverage = Coverage(options.images, options.times, options.seed, progress=_adding_up(counter, total))
        measured = [measure(run, options.steps, coverage) for run in runs]
    own = {key: getattr(options, key) for key in type(options).model_fields if key not in RunOptions.model_fields}
    return _write(options, name, {**own, "weights": "ema"}, measured, draw)


def _over_batches(
    name: str,
    options: GradientsOptions,
    measure: Callable[..., Record],
    steps: Callable[[TrainedRun, Sequence[int] | None, str], list[int]],
    draw: Callable[[list[Record], Path], None],
) -> list[Record]:
    """The runs' records, written and drawn, of an analysis of the gradients of batches.

    steps: those that it measures in a run, of those asked for, with these weights.
    """
    runs = _open(options)
    total = sum(len(steps(run, options.steps, options.weights)) for run in runs) * options.batches
    with Counter(f"measuring {name}", "batches") as counter:
        numbers: dict[str, Any] = {
            "num_batches": options.batches,
            "batch_size": options.batch_size,
            "weights": options.weights,
            "seed": options.seed,
            "progress": _adding_up(counter, total),
        }
        measured = [measure(run, options.steps, **numbers) for run in runs]
    return _write(options, name, {"batches": options.batches, "weights": options.weights}, measured, draw)


def _open(options: RunOptions) -> list[TrainedRun]:
    """The runs that the options name, with their images."""
    refuse_file(options.out)
    reporter = ConsoleProgress()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return open_runs(options.runs, options.data, device, reporter.reading("images"))
    finally:
        reporter.close()


def refuse_file(out: Path) -> None:
    """Raises InputError for an --out that can't be a folder."""
    if out.exists() and not out.is_dir():
        raise InputError(f"`--out` must be a folder, got {out}")


def _adding_up(counter: Counter, total: int) -> Callable[[int], None]:
    """A callback that takes how much more is done."""
    done = 0

    def add(amount: int) -> None:
        nonlocal done
        done += amount
        counter(done, total)

    return add


def _write(
    options: RunOptions,
    name: str,
    protocol: Record,
    measured: list[Record],
    draw: Callable[[list[Record], Path], None],
) -> list[Record]:
    """Writes record and figure. The record first: whatever becomes of the figure, what was measured is kept."""
    protocol = {**protocol, "seed": options.seed, "randomness": RANDOMNESS}
    numbers, figure = options.out / f"{name}.json", options.out / f"{name}.png"
    write_json(numbers, {"analysis": name, "protocol": protocol, "runs": measured})
    draw(measured, figure)
    console.print(f"{figure}, numbers in {numbers}")
    return measured
