"""The page of a run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dia_diffusion.evaluation.record import EvaluationRecord, read_records
from dia_diffusion.models.registry import BACKBONES
from dia_diffusion.report.grids import grid_files, grid_picture, spread
from dia_diffusion.report.metrics import MOST_POINTS, Metrics, metrics_of, peak_memory, running_mean, thin
from dia_diffusion.report.page import Block, Code, Frames, Page, Plot, Plots, Section, Text
from dia_diffusion.report.plots import RATE, Line, curves_figure, training_figure
from dia_diffusion.report.tables import environment_table, protocol_label, protocols_table, results_table
from dia_diffusion.sweeps.collect import training_seconds
from dia_diffusion.sweeps.table import told_time
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.diffusion import build_model
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.run_folder import RunFolder

MOST_GRIDS = 24
QUANTITIES = {"loss": "loss", "gradient norm": "grad_norm", RATE: "lr"}


def run_page(path: Path) -> Page:
    """The page of a run folder.

    Raises:
        InputError: its recipe or its evaluations can't be read.
    """
    folder, name = RunFolder(path), path.resolve().name
    experiment = read_experiment(str(folder.config))
    metrics = metrics_of(path)
    records = read_records(folder.evaluations) if folder.evaluations.is_file() else []
    return Page(
        title=name,
        subtitle=f"A training run, {describe(experiment)}.",
        facts=_facts(experiment, metrics, records),
        sections=[
            Section("Distance", _distance(records, experiment, path)),
            Section("Samples", _samples(path, name, experiment)),
            Section("Training", _training(metrics, experiment, path)),
            Section("Recipe", [Code(folder.config.read_text(encoding="utf-8"))]),
            Section("Environment", _environment(path, experiment, records)),
        ],
    )


def describe(experiment: Experiment) -> str:
    """The model in a few words."""
    model = experiment.to_dict()["model"]
    size = f"{model['sample_size']}x{model['sample_size']} images"
    network = BACKBONES[model["backbone"]].name
    if model["backbone"] == "uvit":
        network += f" {model['hidden_size']} wide with {model['num_layers']} blocks"
    return f"{network} on {size}, attention unit {model['attention']}"


def count_parameters(experiment: Experiment) -> int:
    """Of the recipe's backbone and unit."""
    with torch.device("meta"):  # no memory or time for its weights
        return sum(parameter.numel() for parameter in build_model(experiment.model).parameters())


def _facts(experiment: Experiment, metrics: Metrics, records: Sequence[EvaluationRecord]) -> dict[str, str]:
    steps = metrics[-1]["step"] if metrics else 0
    batch_size = experiment.train.batch_size
    facts = {
        "attention unit": str(experiment.model.attention),
        "batch size": f"{batch_size:,}",
        "seed": str(experiment.seed),
        "steps": f"{steps:,}" + ("" if steps >= experiment.train.max_steps else f" of {experiment.train.max_steps:,}"),
        "images seen": f"{steps * batch_size:,}",
        "parameters": f"{count_parameters(experiment):,}",
    }
    if memory := peak_memory(metrics):
        facts["peak memory"] = f"{memory:,} MiB"
    if seconds := training_seconds(metrics):
        facts["training time"] = told_time(seconds)
    if measured := [record for record in reversed(records) if record.step is not None]:
        last = max(measured, key=lambda record: record.step or 0)
        facts[f"last {last.metric}"] = f"{last.distance:.3f}"
    return facts


def _distance(records: Sequence[EvaluationRecord], experiment: Experiment, path: Path) -> list[Block]:
    if not records:
        return [Text(f"No evaluations yet; `dia-diffusion fid {path} --every-step --reference IMAGES` makes them.")]
    return [*_curves(records, experiment), results_table(records), protocols_table(records)]


def _curves(records: Sequence[EvaluationRecord], experiment: Experiment) -> list[Plots]:
    """One plot a protocol that has more than one point: those of two can't share an axis."""
    by_protocol: dict[str, dict[int, EvaluationRecord]] = {}
    for record in records:
        if record.images_seen is not None:
            by_protocol.setdefault(record.protocol_hash(), {})[record.images_seen] = record  # the later of two counts
    plots = []
    for found in by_protocol.values():
        points = [found[images] for images in sorted(found)]
        if len(points) > 1:
            plots.append(_curve(points, experiment))
    banded = any(record.low is not None for record in records)
    caption = "The band is the 95 % interval over the images that were measured." if banded else ""
    return [Plots(plots, caption)] if plots else []


def _curve(points: Sequence[EvaluationRecord], experiment: Experiment) -> Plot:
    first, last = points[0], points[-1]
    line = Line(
        name=first.metric,
        x=[point.images_seen or 0 for point in points],
        y=[point.distance for point in points],
        low=[point.low for point in points],
        high=[point.high for point in points],
    )
    title = f"{first.metric}, {first.protocol.num_samples:,} samples"
    figure = curves_figure([line], title, step_images=experiment.train.batch_size)
    description = (
        f"{title}, from {first.distance:.3f} at step {first.step:,} to {last.distance:.3f} at step {last.step:,}; "
        "the table below has every point"
    )
    return Plot(figure, description, f"{title} (protocol {protocol_label(first)})")


def _samples(path: Path, name: str, experiment: Experiment) -> list[Block]:
    files = grid_files(path)
    if not files:
        return [Text("No grids yet; a run draws one every `train.sample_every` steps.")]
    chosen = spread(list(files), MOST_GRIDS)
    moments, unreadable = {}, []
    for step in chosen:
        if picture := grid_picture(files[step], step, name, experiment):
            moments[f"step {step:,}, {step * experiment.train.batch_size:,} images"] = [picture]
        else:
            unreadable.append(files[step].name)
    blocks: list[Block] = []
    if moments:
        caption = samples_caption(experiment)
        if len(chosen) < len(files):
            caption += f" {len(chosen)} of the run's {len(files)} grids."
        blocks.append(Frames("The same seeds over training", moments, caption))
    if unreadable:
        blocks.append(Text(f"Not shown, since no whole picture: {', '.join(unreadable)}."))
    return blocks


def samples_caption(experiment: Experiment) -> str:
    """What is in a run's grids."""
    samples = experiment.samples
    guidance = f", guidance {samples.guidance_scale:g}" if samples.guidance_scale != 1 else ""
    return (
        f"Images of the seeds 0 to {samples.count - 1}, not picked; averaged weights, {samples.sampler}, "
        f"{samples.steps} steps{guidance}."
    )


def _training(metrics: Metrics, experiment: Experiment, path: Path) -> list[Block]:
    if not metrics:
        return [Text(f"No metrics yet; `dia-diffusion train --config {path / 'config.yaml'}` makes them.")]
    panels = {title: _quantity(metrics, key) for title, key in QUANTITIES.items()}
    figure = training_figure(panels, experiment.train.batch_size)
    description = f"{', '.join(QUANTITIES)} over {metrics[-1]['step']:,} steps"
    caption = f"Pale: each step's own value, every {experiment.train.log_every} steps; dark: the running mean."
    if len(metrics) > MOST_POINTS:
        caption += f" Of {len(metrics):,} values the lowest and highest of each of {MOST_POINTS // 2:,} stretches."
    return [Plots([Plot(figure, description)], caption)]


def _quantity(metrics: Metrics, key: str) -> list[Line]:
    """A metric as it is, and as its running mean where it isn't smooth by itself."""
    shown = thin(metrics, key)
    own = Line("value", [line["images"] for line in shown], [line[key] for line in shown])
    if key == "lr":
        return [own]
    images, means = running_mean(metrics, key)
    return [replace(own, pale=True), Line("mean", images, means)]


def _environment(path: Path, experiment: Experiment, records: Sequence[EvaluationRecord]) -> list[Block]:
    parameters = Text(f"{count_parameters(experiment):,} parameters, {describe(experiment)}.")
    return [parameters, environment_table([path], records)]
