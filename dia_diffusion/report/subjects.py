"""The page of a run, and that of a study."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.curves import curve_panel, distance_label, points_of
from dia_diffusion.evaluation.record import EvaluationRecord, read_records
from dia_diffusion.figures import Axis, Panel, Series, images_axis, value_axis
from dia_diffusion.io import STEP_FOLDER, shipped_names
from dia_diffusion.models.registry import BACKBONES
from dia_diffusion.report.metrics import mean_of_runs, metric, running_mean, spread, thin
from dia_diffusion.report.page import Block, Code, Frames, Page, Picture, Plot, Plots, read_picture
from dia_diffusion.report.tables import (
    differences_table,
    environment_table,
    guidance_text,
    protocol_label,
    protocols_table,
    results_table,
    shared_recipe,
)
from dia_diffusion.sweeps.collect import last_logged_step, scan, training_seconds
from dia_diffusion.sweeps.figures import curve_panels, final_panel, twins
from dia_diffusion.sweeps.results import results_of
from dia_diffusion.sweeps.sweep import STUDY_FILE, Run, Study, read_study, study_path
from dia_diffusion.sweeps.table import format_time
from dia_diffusion.tables import Table
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.diffusion import build_model
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.run_folder import RunFolder, read_metrics

MOST_GRIDS = 24
"""Of a run."""
MOST_MOMENTS = 6
"""Of a study's grids, which has many runs."""
MOST_POINTS = 10_000
"""Of a metric in a run's plot: 500,000 steps, logged every 50."""
MOST_MEANS = 1_000
"""Of a metric in a study's plot."""
QUANTITIES = {"loss": "loss", "gradient norm": "grad_norm"}
"""Title -> metric."""


@dataclass
class RunData:
    """What there is of a run so far."""

    folder: RunFolder
    name: str
    experiment: Experiment
    metrics: list[dict[str, Any]]
    records: list[EvaluationRecord]

    @classmethod
    def read(cls, path: Path, name: str, experiment: Experiment) -> "RunData":
        folder = RunFolder(path)
        metrics = read_metrics(folder.metrics) if folder.metrics.is_file() else []
        records = read_records(folder.evaluations) if folder.evaluations.is_file() else []
        return cls(folder, name, experiment, metrics, records)

    @property
    def step(self) -> int:
        """The last one of a finished run, else the last one that was logged; 0 before that."""
        logged = self.metrics[-1]["step"] if self.metrics else 0
        return (
            self.experiment.train.max_steps if self.metrics and logged >= last_logged_step(self.experiment) else logged
        )

    @property
    def steps(self) -> str:
        """As "300", or "200 of 300" while it isn't trained."""
        planned = self.experiment.train.max_steps
        return f"{self.step:,}" + ("" if self.step >= planned else f" of {planned:,}")

    @property
    def memory(self) -> str:
        """The largest that was logged, or nothing."""
        key = "peak_memory_mib"
        logged = [line[key] for line in self.metrics if line.get(key) is not None]
        return f"{max(logged):,} MiB" if logged else ""

    @property
    def parameters(self) -> str:
        """Of the backbone with its unit."""
        with torch.device("meta"):  # takes no memory or time for the weights
            return f"{sum(p.numel() for p in build_model(self.experiment.model).parameters()):,}"

    def grids(self) -> dict[int, Path]:
        """Step -> PNG, in rising order."""
        files = {path: STEP_FOLDER.fullmatch(path.stem) for path in self.folder.samples.glob("*.png")}
        return dict(sorted((int(match[1]), path) for path, match in files.items() if match))

    def grid(self, step: int, title: str = "") -> Picture | None:
        """The grid of a step; None if its file is no whole picture."""
        count = self.experiment.samples.count
        description = f"{count} samples of run {self.name} at step {step:,}, seeds 0-{count - 1}"
        return read_picture(self.grids()[step], description, title)


def page_of(subject: str) -> tuple[Page, Path]:
    """The page of a run (its folder) or of a study (its folder, file or name), and the folder.

    Raises:
        InputError: it is neither, nothing is there of the study yet, or files can't be read.
    """
    if RunFolder(subject).config.is_file():
        return run_page(Path(subject)), Path(subject)
    try:
        study_path(subject)
    except InputError:
        raise InputError(
            f"`RUN_OR_STUDY` must be a run's folder, which has a config.yaml, a study's folder, which has a "
            f"{STUDY_FILE}, a study's YAML file, or one of {', '.join(shipped_names('curves'))}, got {subject}"
        ) from None
    study = read_study(subject)
    if not study.folder.is_dir():
        raise InputError(f"nothing of study {subject} is in {study.folder}; `dia-diffusion curves {subject}` makes it")
    return study_page(study), study.folder


# ---- A run


def run_page(path: Path) -> Page:
    """The page of a run folder.

    Raises:
        InputError: its recipe or its evaluations can't be read.
    """
    config = RunFolder(path).config
    run = RunData.read(path, path.resolve().name, read_experiment(str(config)))
    return Page(
        title=run.name,
        subtitle=f"A training run, {describe(run.experiment)}.",
        facts=_facts_of_run(run),
        sections={
            "Distance": _distance_of_run(run),
            "Samples": _frames("The same seeds over training", {"": run}, MOST_GRIDS)
            or ["No grids yet; a run draws one every `train.sample_every` steps."],
            "Training": _training_of_run(run),
            "Recipe": [Code(config.read_text(encoding="utf-8"))],
            "Environment": [environment_table([run.folder], run.records)],
        },
    )


def describe(experiment: Experiment) -> str:
    """The model in a few words."""
    model = experiment.to_dict()["model"]
    network = BACKBONES[model["backbone"]].name
    if model["backbone"] == "uvit":
        network += f" {model['hidden_size']} wide with {model['num_layers']} blocks"
    return f"{network} on {model['sample_size']}x{model['sample_size']} images, attention unit {model['attention']}"


def _facts_of_run(run: RunData) -> dict[str, str]:
    batch_size, seconds = run.experiment.train.batch_size, training_seconds(run.metrics)
    facts = {
        "attention unit": str(run.experiment.model.attention),
        "batch size": f"{batch_size:,}",
        "seed": str(run.experiment.seed),
        "steps": run.steps,
        "images seen": f"{run.step * batch_size:,}",
        "parameters": run.parameters,
        "peak memory": run.memory,
        "training time": format_time(seconds) if seconds else "",
    }
    if evaluated := [record for record in reversed(run.records) if record.step is not None]:
        last = max(evaluated, key=lambda record: record.step or 0)
        facts[f"last {last.metric}"] = f"{last.distance:.3f}"
    return {name: value for name, value in facts.items() if value}


def _distance_of_run(run: RunData) -> list[Block]:
    """A plot per protocol that has more than one point, since those of two can't share an axis; then the tables."""
    if not run.records:
        command = f"dia-diffusion fid {run.folder.path} --every-step --reference IMAGES"
        return [f"No evaluations yet; `{command}` makes them."]
    by_protocol: dict[str, list[EvaluationRecord]] = {}
    for record in run.records:
        if record.images_seen is not None:
            by_protocol.setdefault(record.protocol_hash(), []).append(record)
    plots = []
    for records in by_protocol.values():
        points, title = points_of(records[0].metric, records), distance_label(records[0])
        if len(points) > 1:
            ends = [f"{point['distance']:.3f} at step {point['step']:,}" for point in (points[0], points[-1])]
            description = f"{title}, from {ends[0]} to {ends[1]}; the table below has every point"
            panel = curve_panel([points], title)
            plots.append(Plot([panel], description, f"{title} (protocol {protocol_label(records[0])})"))
    banded = any(record.low is not None for record in run.records)
    caption = "The band is the 95 % interval over the images that were measured." if banded else ""
    curves = [Plots(plots, caption)] if plots else []
    return [*curves, results_table(run.records), protocols_table(run.records)]


def _frames(title: str, runs: Mapping[str, RunData], most: int) -> list[Block]:
    """A slider over the grids that all runs (caption -> run) have, side by side; at most `most` of them."""
    steps = sorted(set.intersection(*(set(run.grids()) for run in runs.values()))) if runs else []
    if not steps:
        return []
    first, chosen = next(iter(runs.values())), spread(steps, most)
    pictures = {step: [run.grid(step, caption) for caption, run in runs.items()] for step in chosen}
    moments = {
        f"step {step:,}, {step * first.experiment.train.batch_size:,} images": shown
        for step in chosen
        if (shown := [picture for picture in pictures[step] if picture])
    }
    samples = first.experiment.samples
    guidance = guidance_text(samples.guidance_scale, samples.guidance_interval)
    caption = f"Images of the seeds 0 to {samples.count - 1}, not picked; averaged weights, {samples.sampler}, "
    caption += f"{samples.steps} steps{f', {guidance}' if guidance else ''}."
    if len(chosen) < len(steps):
        caption += f" {len(chosen)} of {len(steps)} grids."
    blocks: list[Block] = [Frames(title, moments, caption)] if moments else []
    if unreadable := [f"step {step:,}" for step in chosen if not all(pictures[step])]:
        blocks.append(f"Not shown, since truncated or corrupted: {', '.join(unreadable)}.")
    return blocks


def _training_of_run(run: RunData) -> list[Block]:
    """Each metric as logged, pale, and its running mean."""
    if not run.metrics:
        return [f"No metrics yet; `dia-diffusion train --config {run.folder.config}` makes them."]
    x, every, panels = images_axis([run.experiment.train.batch_size]), run.experiment.train.log_every, []
    for title, key in QUANTITIES.items():
        logged = metric(run.metrics, key)
        own = _series(title, *thin(*logged, MOST_POINTS), pale=True)
        mean = _series(f"{title}, running mean", *running_mean(*logged, MOST_POINTS))
        panels.append(Panel([own, mean], x=x, y=value_axis(title, own.y)))
    rate = _series("learning rate", *thin(*metric(run.metrics, "lr"), MOST_POINTS))
    highest = max(map(float, metric(run.metrics, "lr")[1]), default=0.0)
    panels.append(Panel([rate], x=x, y=Axis("learning rate", low=0, high=1.08 * highest or None)))
    logged_at = "each step" if every == 1 else f"every {every} steps"
    caption = f"Pale: values as logged, {logged_at}; dark: their running mean."
    if len(run.metrics) > MOST_POINTS:
        stretches = f"the lowest and highest of each of {MOST_POINTS // 2:,} stretches"
        caption += f" Of {len(run.metrics):,} values {stretches}."
    description = f"{', '.join(QUANTITIES)} and learning rate over {run.step:,} steps"
    return [Plots([Plot(panels, description, height=630, legend=False)], caption)]


# ---- A study


def study_page(study: Study) -> Page:
    """The page of a study, of whatever there is of its runs.

    Raises:
        InputError: evaluations can't be read.
    """
    runs = {run.name: RunData.read(run.folder, run.name, run.experiment) for run in study.runs}
    records = [record for run in runs.values() for record in run.records]
    experiments = {run.name: run.experiment for run in study.runs}
    return Page(
        title=study.name,
        subtitle=f"A study of {', '.join(study.units)} over the recipe {study.config.recipe}.",
        facts=_facts_of_study(study, runs.values()),
        sections={
            "Distance": _distance_of_study(study, records),
            "Samples": _samples_of_study(study, runs),
            "Training": _training_of_study(study, runs),
            "Runs": [_runs_table(study.runs, runs)],
            "Recipe": [Code(shared_recipe(experiments)), differences_table(experiments)],
            "Environment": [environment_table([run.folder for run in runs.values()], records)],
        },
    )


def _facts_of_study(study: Study, runs: Collection[RunData]) -> dict[str, str]:
    trained = sum(run.step >= run.experiment.train.max_steps for run in runs)
    seconds = sum(training_seconds(run.metrics) for run in runs)
    facts = {
        "units": str(len(study.units)),
        "batch sizes": ", ".join(f"{size:,}" for size in study.batch_sizes),
        "seeds": ", ".join(map(str, sorted({run.seed for run in study.runs}))),
        "runs trained": f"{trained}" if trained == len(study.runs) else f"{trained} of {len(study.runs)}",
        "protocol": study.protocol.name,
        "final protocol": study.final_protocol.name if study.final_protocol else "",
        "training time": format_time(seconds) if seconds else "",
    }
    return {name: value for name, value in facts.items() if value}


def _distance_of_study(study: Study, records: Sequence[EvaluationRecord]) -> list[Block]:
    """The study's own figures, tables and notes, and how each distance was measured."""
    inventory = scan(study)
    if not inventory.curve:
        missing = f"No evaluations by protocol {study.protocol.name} yet; {_command(study)} makes them."
        return [missing, *([protocols_table(records)] if records else [])]
    results = results_of(inventory)
    curve, final = results.curve, results.final
    plots = []
    for panel in curve_panels(curve.points, study.units, curve.metric, curve.floor_distance):
        means = [item for item in panel.items if isinstance(item, Series) and not item.pale]
        ends = ", ".join(f"{series.label} ends at {series.y[-1]:.3f}" for series in means)
        plots.append(
            Plot([panel], f"{curve.title} over images seen at {panel.title}: {ends}", panel.title.capitalize())
        )
    blocks: list[Block] = [Plots(plots, "Means over seeds with their 95 % bands; thin, the curve of each seed.")]
    if final:
        panel = final_panel(final.points, study.units, final.metric, final.floor_distance)
        description = f"{final.title} at the end of training; the table below has its numbers"
        title = "End of training: mean over seeds and its 95 % interval; pale, each seed"
        blocks.append(Plots([Plot([panel], description, title)]))
    return [*blocks, *results.tables, *results.notes, protocols_table(records)]


def _samples_of_study(study: Study, runs: Mapping[str, RunData]) -> list[Block]:
    """A slider per batch size: every unit's grid from the same seeds."""
    blocks: list[Block] = []
    for size in study.batch_sizes:
        shown = twins(study, size, lambda run: bool(runs[run.name].grids()))
        title = f"Batch size {size}, training seed {shown[0].seed}" if shown else ""
        blocks += _frames(title, {run.unit: runs[run.name] for run in shown}, MOST_MOMENTS)
    return blocks or [f"No grids yet; {_command(study)} trains the runs that draw them."]


def _training_of_study(study: Study, runs: Mapping[str, RunData]) -> list[Block]:
    """A row of plots per quantity, a plot per batch size, a line per unit."""
    rows = []
    for title, key in QUANTITIES.items():
        by_size: dict[int, list[Series]] = {}
        for size in study.batch_sizes:
            for style, unit in enumerate(study.units):
                own = [runs[run.name].metrics for run in study.runs if (run.unit, run.batch_size) == (unit, size)]
                images, means = running_mean(*mean_of_runs([metric(lines, key) for lines in own]), MOST_MEANS)
                if len(images):
                    by_size.setdefault(size, []).append(_series(unit, images, means, style=style))
        y = value_axis(title, [value for lines in by_size.values() for series in lines for value in series.y])
        plots = []
        for size, lines in by_size.items():
            description = f"{title} over training at batch size {size}: {', '.join(line.label for line in lines)}"
            heading = f"{title.capitalize()} at batch size {size}"
            plots.append(Plot([Panel(lines, x=images_axis([size]), y=y)], description, heading))
        rows += [Plots(plots)] if plots else []
    if rows:
        rows[-1].caption = "Running means of the mean over the seeds that have come furthest."
    return [*rows] or [f"No metrics yet; {_command(study)} trains the runs."]


def _runs_table(planned: Sequence[Run], runs: Mapping[str, RunData]) -> Table:
    columns = ["run", "unit", "batch size", "seed", "steps", "parameters", "last loss", "evaluations", "time", "memory"]
    rows = []
    for run in planned:
        so_far = runs[run.name]
        loss = so_far.metrics[-1].get("loss") if so_far.metrics else None
        evaluations = f"{len(so_far.records)}" if so_far.records else "none yet"
        seconds = format_time(training_seconds(so_far.metrics)) if so_far.metrics else ""
        row = [run.name, run.unit, f"{run.batch_size:,}", str(run.seed), so_far.steps, so_far.parameters]
        rows.append([*row, "none yet" if loss is None else f"{loss:.4f}", evaluations, seconds, so_far.memory])
    return Table(columns, rows, "Every run of the study.", left=("run", "unit"), folded=len(rows) > 12)


def _command(study: Study) -> str:
    name = study.folder if (study.folder / STUDY_FILE).is_file() else study.name
    return f"`dia-diffusion curves {name}`"


def _series(label: str, x: np.ndarray, y: np.ndarray, **how: Any) -> Series:
    return Series(x.tolist(), y.tolist(), label, markers=False, **how)
