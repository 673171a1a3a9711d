"""The pages of runs and studies."""

import base64
import io
from collections.abc import Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from markupsafe import Markup

from dia_diffusion.data.decode import read_file
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.curves import curve_panel, distance_label, points_of
from dia_diffusion.evaluation.record import EvaluationRecord
from dia_diffusion.figures import Axis, Panel, Series, images_axis, value_axis
from dia_diffusion.io import STEP_FOLDER, shipped_names, step_folders
from dia_diffusion.models.registry import BACKBONES
from dia_diffusion.reading import read_yaml
from dia_diffusion.report.metrics import Curve, mean_of_runs, metric, running_mean, spread, thin
from dia_diffusion.report.page import Page, blocks
from dia_diffusion.report.plots import to_plotly
from dia_diffusion.report.tables import environment_table, protocol_label, protocols_table, recipe_tables, results_table
from dia_diffusion.sweeps.collect import last_logged_step, records_of, scan, training_seconds
from dia_diffusion.sweeps.figures import curve_panels, final_panel, twins
from dia_diffusion.sweeps.results import results_of
from dia_diffusion.sweeps.sweep import STUDY_FILE, Run, Study, read_study, study_path
from dia_diffusion.sweeps.table import format_time
from dia_diffusion.tables import Table
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.diffusion import build_model
from dia_diffusion.training.recipe import command_of, read_experiment
from dia_diffusion.training.run_folder import RunFolder, read_metrics

MAX_GRIDS = 24
"""Most grids of one run."""
MAX_GRID_STEPS = 6
"""Most steps at which grids of several runs are shown."""
MAX_POINTS = 10_000
"""Most points of a metric as logged: 500,000 steps, logged every 50."""
MAX_MEANS = 1_000
"""Most points of a running mean."""
QUANTITIES = {"loss": "loss", "gradient norm": "grad_norm", "learning rate": "lr"}
"""Title -> metric."""


class RecordedRun(Run):
    """A run and its output so far."""

    @cached_property
    def paths(self) -> RunFolder:
        return RunFolder(self.folder)

    @cached_property
    def records(self) -> list[EvaluationRecord]:
        return records_of(self)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.paths.metrics) if self.paths.metrics.is_file() else []

    @property
    def step(self) -> int:
        """The last step of a finished run, else the last that was logged or has a checkpoint; 0 before that."""
        logged = self.metrics[-1]["step"] if self.metrics else 0
        if self.metrics and logged >= last_logged_step(self.experiment):
            return self.max_steps
        return max([logged, *step_folders(self.paths.checkpoints)])

    @property
    def facts(self) -> dict[str, str]:
        """Name -> value, empty if unknown."""
        with torch.device("meta"):  # allocates no weights
            parameters = sum(p.numel() for p in build_model(self.experiment.model).parameters())
        (_, losses), (_, memory) = metric(self.metrics, "loss"), metric(self.metrics, "peak_memory_mib")
        seconds, evaluated = training_seconds(self.metrics), [one for one in self.records if one.step is not None]
        last = max(reversed(evaluated), key=lambda record: record.step or 0, default=None)
        return {
            "unit": self.unit,
            "batch size": f"{self.batch_size:,}",
            "seed": f"{self.seed}",
            "steps": _of(self.step, self.max_steps),
            "images seen": f"{self.step * self.batch_size:,}",
            "parameters": f"{parameters:,}",
            "last loss": f"{losses[-1]:.4f}" if len(losses) else "none yet",
            "evaluations": f"{len(self.records) or 'none yet'}",
            "last distance": f"{last.metric} {last.distance:.3f}" if last else "",
            "training time": format_time(seconds) if seconds else "",
            "peak memory": f"{max(memory):,.0f} MiB" if len(memory) else "",
        }

    @cached_property
    def grids(self) -> dict[int, Path]:
        """Step -> PNG, in ascending order."""
        files = {path: STEP_FOLDER.fullmatch(path.stem) for path in self.paths.samples.glob("*.png")}
        return dict(sorted((int(match[1]), path) for path, match in files.items() if match))

    def grid(self, step: int) -> tuple[str, str] | None:
        """A description of a step's grid, and its `data:` URI; None if its file isn't a complete image."""
        try:
            content = read_file(self.grids[step])
            with PIL.Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
                picture.verify()
        except Exception:  # a corrupt file can raise almost anything inside a decoder
            return None
        count = self.experiment.samples.count
        description = f"{count} samples of run {self.name} at step {step:,}, seeds 0-{count - 1}"
        return description, f"data:image/png;base64,{base64.b64encode(content).decode()}"


def page_of(subject: str) -> tuple[Page, Path]:
    """The page of a run (its folder) or of a study (its folder, file or name), and the folder.

    Raises:
        InputError: it is neither, the study has no output yet, or files can't be read.
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


def run_page(path: Path) -> Page:
    """The page of a run folder.

    Raises:
        InputError: its recipe or its evaluations can't be read.
    """
    config = RunFolder(path).config
    if command_of(read_yaml(config, "recipe", "data, model, train")) != Experiment.COMMAND:
        raise InputError(f"`RUN_OR_STUDY` must be a run of `train` or a study, got {path}, a run of `classify`")
    experiment = read_experiment(str(config))
    label = {"unit": experiment.model.attention}
    run = RecordedRun(path.resolve().name, label, experiment.model_copy(update={"output": str(path)}))
    subtitle, command = f"A training run, {describe(experiment)}.", f"dia-diffusion train --config {config}"
    recipe = [blocks.code(config.read_text(encoding="utf-8"))]
    return Page(run.name, subtitle, run.facts, _sections([run], _distance_of_run(run), recipe, command))


def study_page(study: Study) -> Page:
    """The page of a study, with the runs as far as they exist.

    Raises:
        InputError: evaluations can't be read.
    """
    runs = [RecordedRun(**vars(run)) for run in study.runs]
    command = f"dia-diffusion curves {study.folder if (study.folder / STUDY_FILE).is_file() else study.name}"
    seconds = sum(training_seconds(run.metrics) for run in runs)
    facts = {
        "units": f"{len(study.units)}",
        "batch sizes": ", ".join(f"{size:,}" for size in study.batch_sizes),
        "seeds": ", ".join(map(str, sorted({run.seed for run in runs}))),
        "runs trained": _of(sum(run.step >= run.max_steps for run in runs), len(runs)),
        "protocol": study.protocol.name,
        "final protocol": study.final_protocol.name if study.final_protocol else "",
        "training time": format_time(seconds) if seconds else "",
    }
    subtitle = f"A study of {', '.join(study.units)} over the recipe {study.config.recipe}."
    shared, differences = recipe_tables({run.name: run.experiment for run in runs})
    recipe = [blocks.code(shared), blocks.table(differences, folded=True)]
    sections = _sections(runs, _distance_of_study(study, command), recipe, command)
    return Page(study.name, subtitle, facts, sections)


def describe(experiment: Experiment) -> str:
    """The model in a few words."""
    model = experiment.to_dict()["model"]
    network = BACKBONES[model["backbone"]].name
    if model["backbone"] == "uvit":
        network += f" {model['hidden_size']} wide with {model['num_layers']} blocks"
    return f"{network} on {model['sample_size']}x{model['sample_size']} images, attention unit {model['attention']}"


def _sections(
    runs: Sequence[RecordedRun], distance: list[Markup], recipe: list[Markup], command: str
) -> dict[str, list[Markup]]:
    """The sections of a page; `command` is the command that creates missing data."""
    records = [record for run in runs for record in run.records]
    protocols = [blocks.table(protocols_table(records))] if records else []
    rows = [{"run": run.name, **run.facts} for run in runs]
    every = blocks.table(Table.of(rows, "Every run of the study.", left=("run", "unit")), folded=len(rows) > 12)
    return {
        "Distance": [*distance, *protocols],
        "Samples": _samples(runs) or [blocks.text(f"No grids yet; `{command}` draws them.")],
        "Training": _training(runs) or [blocks.text(f"No metrics yet; `{command}` makes them.")],
        **({"Runs": [every]} if len(runs) > 1 else {}),
        "Recipe": recipe,
        "Environment": [blocks.table(environment_table([run.paths for run in runs], records))],
    }


def _distance_of_run(run: RecordedRun) -> list[Markup]:
    """A plot per protocol with more than one point, since protocols can't share an axis; then the records."""
    if not run.records:
        command = f"dia-diffusion fid {run.folder} --every-step --reference IMAGES"
        return [blocks.text(f"No evaluations yet; `{command}` makes them.")]
    by_protocol: dict[str, list[EvaluationRecord]] = {}
    for record in run.records:
        if record.images_seen is not None:
            by_protocol.setdefault(protocol_label(record), []).append(record)
    plots = []
    for protocol, records in by_protocol.items():
        points, title = points_of(records[0].metric, records), distance_label(records[0])
        if len(points) > 1:
            plots.append(to_plotly([curve_panel([points], title)], f"{title} (protocol {protocol})"))
    banded = any(record.low is not None for record in run.records)
    caption = "The band is the 95 % interval over the images that were measured." if banded else ""
    return [blocks.plots(plots, caption), blocks.table(results_table(run.records))]


def _distance_of_study(study: Study, command: str) -> list[Markup]:
    """The study's own figures, tables and notes."""
    inventory = scan(study)
    if not inventory.curve:
        return [blocks.text(f"No evaluations by protocol {study.protocol.name} yet; `{command}` makes them.")]
    results = results_of(inventory)
    curve, final = results.curve, results.final
    panels = curve_panels(curve.points, study.units, curve.metric, curve.floor_distance)
    plots = [to_plotly([panel], panel.title.capitalize()) for panel in panels]
    parts = [blocks.plots(plots, "Means over seeds with their 95 % bands; thin, the curve of each seed.")]
    if final:
        panel = final_panel(final.points, study.units, final.metric, final.floor_distance)
        title = "End of training: mean over seeds and its 95 % interval; pale, each seed"
        parts.append(blocks.plots([to_plotly([panel], title)]))
    return [*parts, *map(blocks.table, results.tables), *map(blocks.text, results.notes)]


def _samples(runs: Sequence[RecordedRun]) -> list[Markup]:
    """A slider per batch size over the grids that all units have, side by side, from the same seeds."""
    sliders = []
    for size in sorted({run.batch_size for run in runs}):
        shown = twins(runs, size, lambda run: bool(run.grids))
        steps = sorted(set.intersection(*(set(run.grids) for run in shown))) if shown else []
        chosen, moments, corrupt = spread(steps, MAX_GRIDS if len(runs) == 1 else MAX_GRID_STEPS), {}, []
        for step in chosen:
            grids = {run.unit: run.grid(step) for run in shown}
            if pictures := [(unit, *grid) for unit, grid in grids.items() if grid]:
                moments[f"step {step:,}, {step * size:,} images"] = pictures
            corrupt += [] if all(grids.values()) else [f"step {step:,}"]
        if chosen:
            samples = shown[0].experiment.samples
            within = f" in {samples.guidance_interval}" if samples.guidance_interval else ""
            guidance = "" if samples.guidance_scale == 1 else f", guidance {samples.guidance_scale:g}{within}"
            caption = f"Images of the seeds 0 to {samples.count - 1}, not picked; averaged weights, {samples.sampler}, "
            caption += f"{samples.steps} steps{guidance}. {len(chosen)} of {len(steps)} grids."
            caption += f" Not shown, since truncated or corrupted: {', '.join(corrupt)}." if corrupt else ""
            title = f"Batch size {size}, training seed {shown[0].seed}"
            sliders.append(blocks.frames(title, moments, caption))
    return sliders


def _training(runs: Sequence[RecordedRun]) -> list[Markup]:
    """A plot per batch size, a panel per quantity, a line per unit; for a single run, the logged values too."""
    single, units = len(runs) == 1, list(dict.fromkeys(run.unit for run in runs))
    panels: dict[int, list[Panel]] = {size: [] for size in sorted({run.batch_size for run in runs})}
    for title, key in QUANTITIES.items():
        lines: dict[int, list[Series]] = {size: [] for size in panels}
        for size, (style, unit) in product(panels, enumerate(units)):
            own = [run.metrics for run in runs if (run.unit, run.batch_size) == (unit, size)]
            curve = mean_of_runs([metric(logged, key) for logged in own])
            if single:
                lines[size].append(_series(title, thin(*curve, MAX_POINTS), pale=True))
            label = f"{title}, running mean" if single else unit
            lines[size].append(_series(label, running_mean(*curve, MAX_MEANS), style))
        values = [value for group in lines.values() for line in group for value in line.y]
        y = Axis(title, low=0) if key == "lr" else value_axis(title, values)  # the same for all batch sizes
        for size, group in lines.items():
            panels[size].append(Panel(group, x=images_axis([size]), y=y))
    plots = [to_plotly(group, f"Batch size {size}", height=630) for size, group in panels.items()]
    caption = "Running means of the mean over the seeds that have come furthest."
    if single:
        every = f"every {runs[0].experiment.train.log_every} steps"
        segments = f"of more than {MAX_POINTS:,}, the lowest and highest of {MAX_POINTS // 2:,} segments"
        caption = f"Pale: values as logged {every}; {segments}. Dark: their running mean."
    return [blocks.plots(plots, caption)] if any(run.metrics for run in runs) else []


def _series(label: str, curve: Curve, style: int = 0, pale: bool = False) -> Series:
    x, y = curve
    return Series(x.tolist(), y.tolist(), label, style, markers=False, pale=pale)


def _of(done: int, planned: int) -> str:
    """Text such as "300", or "200 of 300" while some are missing."""
    return f"{done:,}" + ("" if done >= planned else f" of {planned:,}")
