"""`dia-diffusion curves STUDY`: trains and measures what a study is missing, and draws its results."""

import os

from dia_diffusion.cli.console import Counter, console
from dia_diffusion.cli.curves import Options
from dia_diffusion.errors import InputError, Stopped, number_of
from dia_diffusion.io import FolderLock, remove_partial
from dia_diffusion.precision import Precision, slow_warning, training_device
from dia_diffusion.sweeps.checks import check_images, check_randomness, check_recipes, check_runs
from dia_diffusion.sweeps.collect import Inventory, in_one_precision, scan
from dia_diffusion.sweeps.figures import draw_grids_of_study
from dia_diffusion.sweeps.launcher import run_study, threads_per_job
from dia_diffusion.sweeps.plan import Plan, compare_with_plan, make_plan, read_plan, write_plan
from dia_diffusion.sweeps.results import Results, results_of, write_results
from dia_diffusion.sweeps.sweep import Study, read_study, write_study
from dia_diffusion.sweeps.table import format_time
from dia_diffusion.tables import Table

BUSY = 0.8
"""Share of a core below which times say more of other work than of this."""


class SweepCounter(Counter):
    """A counter with what was done before as its first call."""

    begun = False

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if not self.begun:
            self.begun = True
            self.start_at(done, total)
        super().__call__(done, total, note)


def run_study_command(options: Options) -> None:
    """Plans, runs or draws the study."""
    refuse_launcher("a study starts its own processes; run it without a launcher, with --jobs N")
    study, precision = in_one_precision(_read(options))
    check_recipes(study)
    inventory = scan(study)
    check_runs(inventory)
    if options.only_plot:
        _draw(inventory)
        return
    check_randomness(inventory)
    if options.plan:
        _plan(inventory, options.jobs)
        return
    with Counter("reading", "images") as counter:
        check_images(inventory, counter)
    with FolderLock(study.folder):
        remove_partial(study.folder)
        try:
            _run(scan(study), options.jobs, precision)  # another process may have worked in it until now
            _draw(scan(study))
        except KeyboardInterrupt as interrupt:  # a second one, or one while it draws
            text = "ended at once; the same command resumes from what is written"
            raise Stopped(number_of(interrupt), text) from None


def refuse_launcher(text: str) -> None:
    """Raises InputError under `accelerate launch` or torchrun with several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(text)


def _read(options: Options) -> Study:
    changes = {key: getattr(options, key) for key in ("protocol", "final_protocol", "reference")}
    changes = {key: value for key, value in changes.items() if value is not None}
    if changes.get("final_protocol") == "none":
        changes["final_protocol"] = None
    overrides = {} if options.data is None else {"data.source": options.data}
    return read_study(options.subjects[0], options.output, overrides, changes)


def _run(inventory: Inventory, jobs: int, precision: Precision | None) -> None:
    study, missing = inventory.study, sum(not state.complete for state in inventory.states)
    if not missing:
        return
    parallel = f", {jobs} at a time" if jobs > 1 else ""
    console.print(
        f"{study.name}: {missing} of {len(study.runs)} runs to train or to measure{parallel}, in {study.folder}"
        + ("" if precision is None else f"; training in {precision}")
    )
    if precision is not None and (warning := slow_warning(precision, training_device())):
        console.print(warning)
    write_study(study)
    with SweepCounter(study.name, "passes") as counter:
        run_study(inventory, jobs, counter)


def _draw(inventory: Inventory) -> None:
    study = inventory.study
    with console.status("measuring real images for the floor line, where that is not on record"):
        results = results_of(inventory)
    print_results(results)
    drawn = [*write_results(results), *draw_grids_of_study(study)]
    console.print(f"\nIn {study.folder}: {', '.join(path.name for path in drawn)}")
    if plan := read_plan(study):
        _print_taken(inventory, plan)


def print_results(results: Results) -> None:
    """The tables of results.md and the notes below them."""
    for table in results.tables:
        console.print(table.to_rich())
        console.print()
    for note in results.notes:
        console.print(note)


def _plan(inventory: Inventory, jobs: int) -> None:
    study = inventory.study
    with console.status("measuring") as status:
        plan = make_plan(inventory, jobs, lambda what: status.update(f"measuring {what}"))
    columns = ["batch size", "unit", "runs", "trained", "steps left", "a step", "training left"]
    rows = [
        (
            f"{group.batch_size}",
            group.unit,
            f"{group.runs}",
            f"{group.trained}",
            f"{group.steps_left:,}",
            f"{1000 * group.seconds_of_step:.1f} ms",
            format_time(group.training_seconds_left),
            f"{group.evaluations_left}",
            format_time(group.seconds_of_evaluation),
            format_time(group.seconds_of_final) if study.final_protocol else "-",
            format_time(group.evaluation_seconds_left),
        )
        for group in plan.groups
    ]
    columns += ["evaluations left", "each", "final", "measuring left"]
    console.print(Table(columns, rows).to_rich())
    complete = sum(state.complete for state in inventory.states)
    gpu = "CPU" not in plan.measured_on
    hours = plan.seconds_left * (1 if gpu else threads_per_job(jobs)) / 3600
    console.print(
        f"\n{len(study.runs)} runs, {complete} complete. Left: {hours:.1f} {'GPU' if gpu else 'core'}-hours, "
        f"{format_time(plan.wall_seconds_left)} with --jobs {jobs}; of these "
        f"{format_time(plan.start_seconds_left)} for starting processes, nothing for reading images.\n"
        f"Disk: {plan.bytes / 1e9:.2f} GB in all in {study.folder}, where {plan.bytes_free / 1e9:.0f} GB are free.\n"
        f"Measured on {plan.measured_on}, on random images, one process at a time; kept in {write_plan(study, plan)}"
    )
    if plan.cpu_share < BUSY and not gpu:
        console.print(f"Other work left the measuring {100 * plan.cpu_share:.0f} % of a core; alone it will be faster.")


def _print_taken(inventory: Inventory, plan: Plan) -> None:
    """What the study took beside what was planned."""
    if taken := compare_with_plan(plan, inventory):
        times = ("planned_training", "training", "planned_evaluation", "evaluation")
        rows = [(f"{row['batch_size']}", row["unit"], *(format_time(row[name]) for name in times)) for row in taken]
        rows.append(("all", "", *(format_time(sum(row[name] for row in taken)) for name in times)))
        console.print()
        columns = ["batch size", "unit", "training planned", "took", "measuring planned", "took"]
        console.print(Table(columns, rows, f"Against the plan of {plan.time}").to_rich())
