"""The page of a study."""

from collections.abc import Sequence
from dataclasses import dataclass

from dia_diffusion.evaluation.record import EvaluationRecord, read_records
from dia_diffusion.report.grids import grid_files, grid_picture, spread
from dia_diffusion.report.metrics import (
    Metrics,
    mean_of_runs,
    metrics_of,
    peak_memory,
    running_mean,
)
from dia_diffusion.report.page import Block, Code, Frames, Page, Picture, Plot, Plots, Section, Table, Text
from dia_diffusion.report.plots import Line, curves_figure, ends_figure
from dia_diffusion.report.recipes import differences_table, shared_recipe
from dia_diffusion.report.run import count_parameters, samples_caption
from dia_diffusion.report.tables import environment_table, protocols_table
from dia_diffusion.sweeps.collect import scan, training_seconds
from dia_diffusion.sweeps.figure import drawn_end
from dia_diffusion.sweeps.grids import twins
from dia_diffusion.sweeps.results import Measurement, results_of
from dia_diffusion.sweeps.stats import Estimate, curve_of, estimate
from dia_diffusion.sweeps.sweep import STUDY_FILE, Run, Study
from dia_diffusion.sweeps.table import LEFT_ALIGNED, told_time
from dia_diffusion.training.run_folder import RunFolder

MOST_MOMENTS = 6
"""Of a study's grids, which has many runs."""
MOST_POINTS = 1_000
"""Of a mean over runs."""
QUANTITIES = {"loss": "loss", "gradient norm": "grad_norm"}


@dataclass
class RunSoFar:
    """What is there of a run."""

    run: Run
    metrics: Metrics
    records: list[EvaluationRecord]


def study_page(study: Study) -> Page:
    """The page of a study, of whatever is there of its runs.

    Raises:
        InputError: evaluations that can't be read.
    """
    runs = [_so_far(run) for run in study.runs]
    records = [record for so_far in runs for record in so_far.records]
    experiments = {run.name: run.experiment for run in study.runs}
    return Page(
        title=study.name,
        subtitle=f"A study of {', '.join(study.units)} over the recipe {study.config.recipe}.",
        facts=_facts(study, runs),
        sections=[
            Section("Distance", _distance(study, records)),
            Section("Samples", _samples(study)),
            Section("Training", _training(study, runs)),
            Section("Runs", [_runs_table(runs)]),
            Section("Recipe", [Code(shared_recipe(experiments)), differences_table(experiments)]),
            Section(
                "Environment", [environment_table([run.folder for run in study.runs if run.folder.is_dir()], records)]
            ),
        ],
    )


def _so_far(run: Run) -> RunSoFar:
    file = RunFolder(run.folder).evaluations
    return RunSoFar(run, metrics_of(run.folder), read_records(file) if file.is_file() else [])


def _facts(study: Study, runs: Sequence[RunSoFar]) -> dict[str, str]:
    trained = sum(_steps(so_far) >= so_far.run.experiment.train.max_steps for so_far in runs)
    seconds = sum(training_seconds(so_far.metrics) for so_far in runs)
    facts = {
        "units": str(len(study.units)),
        "batch sizes": _told_list(study.batch_sizes),
        "seeds": _told_list(sorted({run.seed for run in study.runs})),
        "runs trained": f"{trained}" if trained == len(runs) else f"{trained} of {len(runs)}",
        "protocol": study.config.protocol,
    }
    if study.config.final_protocol:
        facts["final protocol"] = study.config.final_protocol
    if seconds:
        facts["training time"] = told_time(seconds)
    return facts


def _distance(study: Study, records: Sequence[EvaluationRecord]) -> list[Block]:
    """What the study has found, in its own numbers: curves, ends, tables and how each was measured."""
    inventory = scan(study)
    if not inventory.curve:
        protocol, command = study.config.protocol, f"`dia-diffusion curves {_subject(study)}`"
        missing = Text(f"No evaluations by protocol {protocol} yet; {command} makes them.")
        return [missing, *([protocols_table(records)] if records else [])]
    results = results_of(inventory)
    panels = [plot for size in study.batch_sizes for plot in _panel(study, results.curve, size)]
    blocks: list[Block] = [Plots(panels, "Means over seeds with their 95 % bands; thin, the curve of each seed.")]
    if results.final:
        blocks.append(Plots([_ends(study, results.final)]))
    for table in results.tables:
        numbers = {*table.columns} - {*LEFT_ALIGNED}
        blocks.append(Table(table.columns, table.rows, f"{table.title}.", numbers))
    return [*blocks, *(Text(note) for note in results.notes), protocols_table(records)]


def _panel(study: Study, curves: Measurement, batch_size: int) -> list[Plot]:
    """The plot of a batch size; none where nothing of it is measured."""
    singles, means = [], []
    for index, unit in enumerate(study.units):
        if (curve := curve_of(curves.points, unit, batch_size)) is None:
            continue
        for distances in curve.by_seed.values() if len(curve.by_seed) > 1 else ():
            singles.append(Line(unit, curve.images_seen, distances, index, pale=True))
        means.append(_line(unit, curve.images_seen, curve.mean, index))
    if not means:
        return []
    figure = curves_figure(
        [*singles, *means],
        curves.metric,
        step_images=batch_size,
        floor=curves.floor_distance,
        values=[point.distance for point in curves.points],
    )
    ends = ", ".join(f"{line.name} ends at {line.y[-1]:.3f}" for line in means)
    description = f"{curves.title} over images seen at batch size {batch_size}: {ends}"
    return [Plot(figure, description, f"Batch size {batch_size}")]


def _ends(study: Study, final: Measurement) -> Plot:
    """The ends of training against batch size."""
    singles, means = [], []
    for index, unit in enumerate(study.units):
        own = [point for point in final.points if point.unit == unit]
        sizes = sorted({point.batch_size for point in own})
        of_size = [[point.distance for point in own if point.batch_size == size] for size in sizes]
        if own:
            seeds = [f"seed {point.seed}" for point in own]
            x, y = [point.batch_size for point in own], [point.distance for point in own]
            singles.append(Line(unit, x, y, index, hover=seeds, pale=True))
            means.append(_line(unit, sizes, [estimate(distances) for distances in of_size], index))
    figure = ends_figure(means, singles, f"final {final.metric}", floor=final.floor_distance)
    description = f"{final.title} at the end of training against batch size; the table below has its numbers"
    return Plot(figure, description, "End of training: mean over seeds and its 95 % interval; pale, each seed")


def _line(unit: str, x: Sequence[int], means: Sequence[Estimate], index: int) -> Line:
    return Line(
        name=unit,
        x=x,
        y=[value.mean for value in means],
        index=index,
        low=[drawn_end(value, -1) for value in means],
        high=[drawn_end(value, 1) for value in means],
    )


def _samples(study: Study) -> list[Block]:
    """A slider a batch size: every unit's grid from the same seeds, at the steps that all of them have."""
    blocks: list[Block] = []
    for batch_size in study.batch_sizes:
        runs = twins(study, batch_size, lambda run: bool(grid_files(run.folder)))
        steps = sorted(set.intersection(*(set(grid_files(run.folder)) for run in runs))) if runs else []
        moments: dict[str, list[Picture]] = {}
        for step in spread(steps, MOST_MOMENTS):
            found = [
                grid_picture(grid_files(run.folder)[step], step, run.name, run.experiment, run.unit) for run in runs
            ]
            if pictures := [picture for picture in found if picture is not None]:
                moments[f"step {step:,}, {step * batch_size:,} images"] = pictures
        if moments:
            title = f"Batch size {batch_size}, training seed {runs[0].seed}"
            blocks.append(Frames(title, moments, samples_caption(runs[0].experiment)))
    return blocks or [Text(f"No grids yet; `dia-diffusion curves {_subject(study)}` trains the runs that draw them.")]


def _training(study: Study, runs: Sequence[RunSoFar]) -> list[Block]:
    """A row of panels a quantity, a panel a batch size, a line a unit."""
    blocks: list[Block] = []
    for name, key in QUANTITIES.items():
        panels = {size: _mean_lines(study, runs, size, key) for size in study.batch_sizes}
        panels = {size: lines for size, lines in panels.items() if lines}
        values = [value for lines in panels.values() for line in lines for value in line.y]
        plots = [
            Plot(
                curves_figure(lines, name, step_images=size, values=values, markers=False),
                f"{name} over training at batch size {size}: {', '.join(line.name for line in lines)}",
                f"{name.capitalize()} at batch size {size}",
            )
            for size, lines in panels.items()
        ]
        if plots:
            caption = "Running means of the mean over the seeds that have come furthest."
            blocks.append(Plots(plots, caption if key == list(QUANTITIES.values())[-1] else ""))
    return blocks or [Text(f"No metrics yet; `dia-diffusion curves {_subject(study)}` trains the runs.")]


def _mean_lines(study: Study, runs: Sequence[RunSoFar], batch_size: int, key: str) -> list[Line]:
    lines = []
    for index, unit in enumerate(study.units):
        of_unit = [s.metrics for s in runs if (s.run.unit, s.run.batch_size) == (unit, batch_size) and s.metrics]
        images, means = running_mean(mean_of_runs(of_unit, key), key, MOST_POINTS)
        if images:
            lines.append(Line(unit, images, means, index))
    return lines


def _runs_table(runs: Sequence[RunSoFar]) -> Table:
    columns = ["run", "unit", "batch size", "seed", "steps", "parameters", "last loss", "evaluations", "time", "memory"]
    rows = []
    for so_far in runs:
        run, metrics = so_far.run, so_far.metrics
        steps, wanted = _steps(so_far), run.experiment.train.max_steps
        memory = peak_memory(metrics)
        loss = metrics[-1].get("loss") if metrics else None
        rows.append(
            [
                run.name,
                run.unit,
                f"{run.batch_size:,}",
                str(run.seed),
                f"{steps:,}" if steps >= wanted else f"{steps:,} of {wanted:,}",
                f"{count_parameters(run.experiment):,}",
                "none yet" if loss is None else f"{loss:.4f}",
                f"{len(so_far.records)}" if so_far.records else "none yet",
                told_time(training_seconds(metrics)) if metrics else "",
                "" if memory is None else f"{memory:,} MiB",
            ]
        )
    return Table(columns, rows, "Every run of the study.", numbers={*columns} - {"run", "unit"}, folded=len(runs) > 12)


def _steps(so_far: RunSoFar) -> int:
    return so_far.metrics[-1]["step"] if so_far.metrics else 0


def _subject(study: Study) -> str:
    """What commands find the study by."""
    return str(study.folder) if (study.folder / STUDY_FILE).is_file() else study.name


def _told_list(numbers: Sequence[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)
