"""`dia-diffusion curves STUDY`: trains and measures what a study is missing, and draws its results."""

import os

from rich.table import Table

from dia_diffusion.cli.console import Counter, console
from dia_diffusion.cli.curves import Options
from dia_diffusion.errors import InputError, Stopped, number_of
from dia_diffusion.io import FolderLock, remove_partial
from dia_diffusion.precision import Precision, slow_warning, training_device
from dia_diffusion.sweeps.collect import check_images, check_randomness, check_study, in_one_precision, inventory
from dia_diffusion.sweeps.figures import draw_grids_of_study
from dia_diffusion.sweeps.launcher import Progress, run_study, threads_of_each
from dia_diffusion.sweeps.plan import Plan, make_plan, read_plan, set_against, write_plan
from dia_diffusion.sweeps.results import Results, results_of, write_results
from dia_diffusion.sweeps.sweep import Study, read_study
from dia_diffusion.sweeps.table import told_time

BUSY = 0.8
"""Share of a core below which times say more of other work than of this."""


def run_study_command(options: Options) -> None:
    """Plans, runs or draws the study."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a study starts processes of its own; run it without a launcher, with --jobs N")
    study, precision = in_one_precision(_read(options))
    check_study(study)
    if not options.only_plot:
        check_randomness(study)
    if options.plan:
        _plan(study, options.jobs)
    elif options.only_plot:
        _draw(study)
    else:
        with Counter("reading", "images") as counter:
            check_images(study, counter)
        with FolderLock(study.folder):
            remove_partial(study.folder)
            try:
                _run(study, options.jobs, precision)
                _draw(study)
            except KeyboardInterrupt as interrupt:  # a second one, or one while it draws
                text = "ended at once; the same command resumes from what is written"
                raise Stopped(number_of(interrupt), text) from None


def _read(options: Options) -> Study:
    changes = {key: getattr(options, key) for key in ("protocol", "final_protocol", "reference")}
    changes = {key: value for key, value in changes.items() if value is not None}
    if changes.get("final_protocol") == "none":
        changes["final_protocol"] = None
    overrides = {} if options.data is None else {"data.source": options.data}
    return read_study(options.subjects[0], options.output, overrides, changes)


def _run(study: Study, jobs: int, precision: Precision | None) -> None:
    missing = sum(not state.complete for state in inventory(study))
    if not missing:
        return
    at_once = f", {jobs} at a time" if jobs > 1 else ""
    console.print(
        f"{study.name}: {missing} of {len(study.runs)} runs to train or to measure{at_once}, in {study.folder}"
        + ("" if precision is None else f"; training in {precision}")
    )
    if precision is not None and (warning := slow_warning(precision, training_device())):
        console.print(warning)
    with Counter(study.name, "passes") as counter:
        begun = False

        def watch(progress: Progress) -> None:
            nonlocal begun
            if not begun:
                counter.start_at(progress.done, progress.total)
                begun = True
            counter(progress.done, progress.total, progress.note)

        run_study(study, jobs, watch)


def _draw(study: Study) -> None:
    with console.status("measuring real images for the floor line, where that is not on record"):
        results = results_of(study)
    print_results(results)
    drawn = [*write_results(study, results), *draw_grids_of_study(study)]
    console.print(f"\nIn {study.folder}: {', '.join(path.name for path in drawn)}")
    if plan := read_plan(study):
        _set_against(study, plan)


def print_results(results: Results) -> None:
    """The tables of results.md and the notes below them."""
    for table in results.tables:
        console.print(table.to_rich())
        console.print()
    for note in results.notes:
        console.print(note)


def _plan(study: Study, jobs: int) -> None:
    states = inventory(study)
    with console.status("measuring") as status:
        plan = make_plan(study, jobs, lambda what: status.update(f"measuring {what}"))
    table = Table(box=None, pad_edge=False)
    for name in ("batch size", "unit", "runs", "trained", "steps left", "a step", "training left"):
        table.add_column(name, justify="left" if name == "unit" else "right")
    for name in ("evaluations left", "each", "final", "measuring left"):
        table.add_column(name, justify="right")
    for group in plan.groups:
        table.add_row(
            f"{group.batch_size}",
            group.unit,
            f"{group.runs}",
            f"{group.trained}",
            f"{group.steps_left:,}",
            f"{1000 * group.seconds_of_step:.1f} ms",
            told_time(group.training_seconds_left),
            f"{group.evaluations_left}",
            told_time(group.seconds_of_evaluation),
            told_time(group.seconds_of_final) if study.config.final_protocol else "-",
            told_time(group.evaluation_seconds_left),
        )
    console.print(table)
    complete = sum(state.complete for state in states)
    gpu = "CPU" not in plan.measured_on
    hours = plan.seconds_left * (1 if gpu else threads_of_each(jobs)) / 3600
    console.print(
        f"\n{len(study.runs)} runs, {complete} complete. Left: {hours:.1f} {'GPU' if gpu else 'core'}-hours, "
        f"{told_time(plan.wall_seconds_left)} with --jobs {jobs}; of these {told_time(plan.start_seconds_left)} for "
        f"starting processes, nothing for reading images.\n"
        f"Disk: {plan.bytes / 1e9:.2f} GB in all in {study.folder}, where {plan.bytes_free / 1e9:.0f} GB are free.\n"
        f"Measured on {plan.measured_on}, on random images, one process at a time; kept in {write_plan(study, plan)}"
    )
    if plan.cpu_share < BUSY and not gpu:
        console.print(f"Other work left the measuring {100 * plan.cpu_share:.0f} % of a core; alone it will be faster.")


def _set_against(study: Study, plan: Plan) -> None:
    """What it took beside what was planned."""
    taken = set_against(plan, study)
    if not taken:
        return
    table = Table(box=None, pad_edge=False, title=f"Against the plan of {plan.time}", title_justify="left")
    for name in ("batch size", "unit", "training planned", "took", "measuring planned", "took"):
        table.add_column(name, justify="left" if name == "unit" else "right")
    for one in taken:
        times = (one.planned_training, one.training, one.planned_evaluation, one.evaluation)
        table.add_row(f"{one.batch_size}", one.unit, *map(told_time, times))
    sums = [sum(getattr(one, name) for one in taken) for name in ("planned_training", "training")]
    sums += [sum(getattr(one, name) for one in taken) for name in ("planned_evaluation", "evaluation")]
    table.add_row("all", "", *map(told_time, sums))
    console.print()
    console.print(table)
