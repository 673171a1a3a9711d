"""`dia-diffusion curves STUDY`: trains and measures what a study is missing, and draws its results."""

import os
import shutil

import torch

from dia_diffusion.cli.console import Counter, console
from dia_diffusion.cli.curves import Options
from dia_diffusion.environment import device_name
from dia_diffusion.errors import InputError, Stopped, number_of
from dia_diffusion.io import remove_partial
from dia_diffusion.locks import FolderLock
from dia_diffusion.precision import Precision, slow_warning, training_device
from dia_diffusion.sweeps.checks import check_images, check_randomness, check_recipes, check_runs
from dia_diffusion.sweeps.collect import Inventory, in_one_precision, scan
from dia_diffusion.sweeps.figures import draw_grids_of_study
from dia_diffusion.sweeps.launcher import run_study, threads_per_job
from dia_diffusion.sweeps.plan import make_plan
from dia_diffusion.sweeps.results import results_of, write_results
from dia_diffusion.sweeps.sweep import Study, read_study, write_study
from dia_diffusion.sweeps.table import format_time
from dia_diffusion.tables import Table


class SweepCounter(Counter):
    """A counter that takes the first call as work done earlier."""

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
    check_recipes(study.runs, study.protocols)
    inventory = scan(study)
    check_runs(inventory.states)
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
        except KeyboardInterrupt as interrupt:  # a second interrupt, or one while drawing
            text = "stopped immediately; the same command resumes"
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
    for table in results.tables:
        console.print(table.to_rich())
        console.print()
    for note in results.notes:
        console.print(note)
    drawn = [*write_results(results), *draw_grids_of_study(study)]
    console.print(f"\nIn {study.folder}: {', '.join(path.name for path in drawn)}")


def _plan(inventory: Inventory, jobs: int) -> None:
    study, threads = inventory.study, threads_per_job(jobs)
    with console.status("timing each unit and batch size"):
        groups = make_plan(inventory, threads)
    columns = ["batch size", "unit", "runs", "trained", "steps left", "time per step", "training left"]
    columns += ["evaluations left", "measuring left"]
    rows = []
    for group in groups:
        run, states = group.states[0].run, group.states
        training, measuring = map(sum, zip(*group.seconds_left, strict=True))
        evaluations = sum(len(state.unmeasured) + state.final_unmeasured for state in states)
        cells = [f"{run.batch_size}", run.unit, f"{len(states)}", f"{sum(state.trained for state in states)}"]
        cells += [f"{sum(state.steps_left for state in states):,}", f"{1000 * group.seconds_of_step:.1f} ms"]
        rows.append([*cells, format_time(training), f"{evaluations}", format_time(measuring)])
    console.print(Table(columns, rows).to_rich())

    seconds = [sum(left) for group in groups for left in group.seconds_left]
    complete = sum(state.complete for state in inventory.states)
    gpu, disk = torch.cuda.is_available(), sum(group.bytes for group in groups)
    free = shutil.disk_usage(next(path for path in study.folder.absolute().parents if path.is_dir())).free
    console.print(
        f"\n{len(study.runs)} runs, {complete} complete. Left: {sum(seconds) * (1 if gpu else threads) / 3600:.1f} "
        f"{'GPU' if gpu else 'core'}-hours, {format_time(max(sum(seconds) / jobs, max(seconds)))} with --jobs {jobs}.\n"
        f"Disk: {disk / 1e9:.2f} GB in all in {study.folder}, where {free / 1e9:.0f} GB are free.\n"
        f"Timed on {device_name()}, one process at a time; without startup, loading images and features."
    )
