"""`dia-diffusion analyze stability` and `analyze placement`: training runs that an analysis starts and compares."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from dia_diffusion.cli.analyze import PlacementOptions, StabilityOptions, TrialOptions, refuse_file
from dia_diffusion.cli.console import ConsoleProgress, Counter, console
from dia_diffusion.cli.options import Positional
from dia_diffusion.cli.study import SweepCounter, refuse_launcher
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.io import write_json
from dia_diffusion.locks import FolderLock
from dia_diffusion.sweeps.figures import draw_placement, draw_stability
from dia_diffusion.sweeps.outcome import TRAINED, Result, finished, open_held_out, train_trials
from dia_diffusion.sweeps.sweep import Run
from dia_diffusion.sweeps.trials import (
    measure_trials,
    placement_trials,
    run_trials,
    stability_trials,
    summarize_placement,
    summarize_stability,
)
from dia_diffusion.tables import Table
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.run_folder import RunFolder
from dia_diffusion.validation import Strict

COMMON = ("recipe", "held_out")
"""Fields of a trial's result that the record has only once, or that are in the trial's own folder."""
DIVERGED = (
    "not finite: a loss or gradient; no better: at the end, the held-out loss is not below that of the best constant, "
    "one image for all samples of a time"
)
Value = TypeVar("Value")


class Options(Strict):
    """Trains trials in this process, one after the other; `analyze stability` and `analyze placement` start it."""

    runs: Annotated[tuple[str, ...], Positional("RUN")]
    """Folders that contain the recipes, as config.yaml."""
    held_out: str | None = None
    images: int
    times: int


def run(options: Options) -> None:
    """Trains the trials and measures their held-out losses."""
    experiments = [read_experiment(str(RunFolder(run).config)) for run in options.runs]
    held_out = open_held_out(experiments[0], options.held_out, options.images, options.times)
    with ConsoleProgress() as progress:
        train_trials(experiments, held_out, progress)


def stability(options: StabilityOptions) -> None:
    """Tests which units still train, at which learning rates, with a part of the network removed."""
    _check(options)
    units = _unique(options.units)
    trials = stability_trials(
        options.out / "stability",
        options.config,
        variants=_unique(options.variants),
        units=units,
        rates=_unique(options.learning_rates),
        seeds=_unique(options.seeds),
        batch_size=options.batch_size,
        steps=options.steps,
        keys=_keys(options),
    )
    if (results := _trained(options, trials)) is None:
        return
    protocol = {"batch_size": options.batch_size, "schedule": "constant, no warm-up"}
    rows = summarize_stability(results)
    _write(options, "stability", protocol, results, rows, draw_stability)
    _print_stability(rows, units)


def placement(options: PlacementOptions) -> None:
    """Tests which blocks need to carry the unit."""
    _check(options)
    protocol = None if options.protocol is None else EvalProtocol.read(options.protocol)
    trials = placement_trials(
        options.out / "placement",
        options.config,
        unit=options.unit,
        seeds=_unique(options.seeds),
        steps=options.steps,
        keys=_keys(options),
    )
    if (results := _trained(options, trials)) is None:
        return
    metric = None
    if protocol is not None:
        with Counter("measuring distances", "trials") as counter:
            metric = measure_trials(trials, results, protocol, str(options.protocol), options.jobs, counter)
    rows = summarize_placement(results, trials[0].experiment.to_dict()["model"]["num_layers"])
    _write(options, "placement", {"unit": options.unit, "metric": metric}, results, rows, draw_placement)
    _print_placement(rows, metric)


def _check(options: TrialOptions) -> None:
    refuse_file(options.out)
    refuse_launcher("this analysis starts its own processes; run it without a launcher, with --jobs N")


def _unique(values: Sequence[Value]) -> list[Value]:
    return list(dict.fromkeys(values))


def _keys(options: TrialOptions) -> dict[str, Any]:
    return {} if options.data is None else {"data.source": options.data}


def _trained(options: StabilityOptions | PlacementOptions, trials: list[Run]) -> list[Result] | None:
    """The trials' results; None if only the plan is requested."""
    missing = [trial for trial in trials if finished(trial) is None]
    folder = trials[0].folder.parent
    steps = sum(trial.max_steps for trial in missing)
    console.print(f"{len(trials)} trainings in {folder}, {len(missing)} missing: {steps:,} steps")
    if options.plan:
        return None
    held_out = open_held_out(trials[0].experiment, options.held_out, options.images, options.times)
    with FolderLock(folder), SweepCounter("training", "steps") as counter:
        return run_trials(trials, held_out, options.jobs, counter)


def _write(
    options: StabilityOptions | PlacementOptions,
    analysis: str,
    protocol: dict[str, Any],
    results: list[Result],
    rows: list[dict[str, Any]],
    draw: Callable[[dict[str, Any], Path], None],
) -> None:
    """Writes the record first, so that the measurements are kept if the figure fails."""
    common = {"recipe": options.config, "steps": options.steps, "held_out": results[0]["held_out"]}
    trials = [{key: value for key, value in result.items() if key not in COMMON} for result in results]
    record = {
        "analysis": analysis,
        "protocol": {**common, "weights": "ema", "diverged": DIVERGED, **protocol},
        "summary": rows,
        "trials": trials,
    }
    numbers, figure = options.out / f"{analysis}.json", options.out / f"{analysis}.png"
    write_json(numbers, record)
    draw(record, figure)
    console.print(f"{figure}, numbers in {numbers}")


def _print_stability(rows: list[dict[str, Any]], units: list[str]) -> None:
    lines = []
    for variant, rate in dict.fromkeys((row["variant"], row["learning_rate"]) for row in rows):
        own = {row["unit"]: row for row in rows if (row["variant"], row["learning_rate"]) == (variant, rate)}
        lines.append([variant, f"{rate:g}", *(_cell(own[unit]) for unit in units)])
    columns = ["variant", "learning rate", *units]
    table = Table(columns, lines, "held-out loss of the seeds that trained", left=["variant"])
    console.print(table.to_rich())


def _cell(row: dict[str, Any]) -> str:
    failed = [outcome for outcome in row["outcomes"] if outcome != TRAINED]
    parts = [f"{failed.count(outcome)} {outcome}" for outcome in dict.fromkeys(failed)]
    if row["not_finite_at"]:
        parts.append(f"step {statistics.median(row['not_finite_at']):.0f}")
    loss = [] if row["held_out_loss"] is None else [f"{row['held_out_loss']:.4f}"]
    return ", ".join(loss + parts)


def _print_placement(rows: list[dict[str, Any]], metric: str | None) -> None:
    names = {"held_out_loss": "held-out loss", **({} if metric is None else {"distance": metric})}
    lines = []
    for row in rows:
        seeds = f"{row['seeds']}" + (f", {row['diverged']} diverged" if row["diverged"] else "")
        cells = (_mean(row, key, 4 if key == "held_out_loss" else 2) for key in names)
        lines.append([row["placement"], " ".join(map(str, row["blocks"])) or "-", seeds, *cells])
    columns = ["placement", "blocks", "seeds", *names.values()]
    console.print(Table(columns, lines, "mean over seeds ± 95 %", left=["placement", "blocks"]).to_rich())


def _mean(row: dict[str, Any], key: str, digits: int) -> str:
    mean, half = row[f"{key}_mean"], row[f"{key}_half_width"]
    return "-" if mean is None else f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")
