"""`dia-diffusion curves`: distance against images seen, of a study or a line a run (the paper's Fig. 8)."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.console import console
from dia_diffusion.cli.imports import imports
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.floor import recorded_floor
from dia_diffusion.evaluation.record import EvaluationRecord, read_records
from dia_diffusion.io import write_json
from dia_diffusion.studies.study import STUDY_FILE, study_names
from dia_diffusion.training.run_folder import RunFolder

STUDY_OPTIONS = ("output", "data", "reference", "final_protocol", "jobs", "plan", "only_plot")
"""What `add_study_options` adds, by the names that they have once parsed."""

RUN_OPTIONS = ("out", "floor", "title")
"""What says something of run folders only."""


def run(arguments: Sequence[str]) -> None:
    """Draws what the arguments say; of a study, trains and measures first what is missing."""
    parser = CommandParser("curves", "Draws distance against images seen: of a study, or of runs that `fid` measured.")
    parser.add_argument(
        "subjects",
        nargs="+",
        metavar="STUDY_or_RUN",
        help=f"a study: a YAML file, its folder, or one of {', '.join(study_names())}; or run folders with evaluations",
    )
    parser.add_argument(
        "--protocol",
        help="of a study: the one of its curves, by name or file; of runs measured by several: the start of its hash",
    )
    add_study_options(parser)
    group = parser.add_argument_group("options of runs")
    group.add_argument("--out", type=Path, default=Path("curves.png"), help="the figure; its numbers lie beside it")
    group.add_argument(
        "--floor",
        metavar="FILE_or_DISTANCE",
        help="a line for what a perfect model would reach: a number, or the file that `fid` recorded real images in",
    )
    group.add_argument("--title", help="above the figure")
    options = parser.parse_args(arguments)
    study = len(options.subjects) == 1 and names_study(options.subjects[0])
    for name in RUN_OPTIONS if study else STUDY_OPTIONS:
        if (value := getattr(options, name)) != parser.get_default(name):
            said = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            which = "a study" if study else "run folders"
            raise InputError(f"{said} says nothing of {which}; leave it out")
    if study:
        with imports():
            from dia_diffusion.cli.study import run_study_command
        run_study_command(options)
    else:
        _draw_runs(options)


def add_study_options(parser: CommandParser) -> None:
    """--output, --data, --reference, --final-protocol, --jobs, --plan, --only-plot."""
    group = parser.add_argument_group("options of a study")
    group.add_argument("--output", help="the study's folder; if none, the one that the study names")
    group.add_argument("--data", metavar="SOURCE", help="the images to train on; if none, the recipe's data.source")
    group.add_argument("--reference", metavar="DATA", help="the images to measure against; if none, those trained on")
    group.add_argument("--final-protocol", metavar="NAME", help="of the last checkpoints; none for none")
    group.add_argument("--jobs", type=int, default=1, help="runs side by side, the cores divided, or a GPU each")
    what = group.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="only say what is missing, and what it would take")
    what.add_argument("--only-plot", action="store_true", help="only draw what there is")


def names_study(name: str) -> bool:
    """Whether it is a study: what is no folder, the folder of one, or a shipped one's name rather than a run's."""
    folder = RunFolder(name)
    is_run = folder.config.is_file() or folder.evaluations.is_file()
    return not folder.path.is_dir() or (folder.path / STUDY_FILE).is_file() or (name in study_names() and not is_run)


def _draw_runs(options: argparse.Namespace) -> None:
    runs = [(label(run), records(run, options.protocol)) for run in options.subjects]
    floor = None if options.floor is None else floor_of(options.floor, runs[0][1][0])
    with imports():
        from dia_diffusion.evaluation.curves import draw_curves
    points = draw_curves(runs, options.out, floor=floor, title=options.title)
    numbers = options.out.with_suffix(".json")
    write_json(numbers, points)
    console.print(f"{len(points)} points of {len(runs)} runs: {options.out}, numbers in {numbers}")


def label(run: str) -> str:
    """A run's name in the legend."""
    return Path(run).resolve().name


def records(run: str, protocol: str | None = None) -> list[EvaluationRecord]:
    """A run's records, of one protocol where its hash's start is given."""
    file = RunFolder(run).evaluations
    if not file.is_file():
        raise InputError(f"{run} has no evaluations.jsonl; `dia-diffusion fid {run} --every-step` makes it")
    found = [r for r in read_records(file) if protocol is None or r.protocol_hash().startswith(protocol)]
    if not found:
        raise InputError(f"{run} has no evaluations of protocol {protocol}")
    return found


def floor_of(floor: str, record: EvaluationRecord) -> float:
    """A number, or the distance of a file's newest record that was measured as a run's record was."""
    try:
        return float(floor)
    except ValueError:
        if not Path(floor).is_file():
            raise InputError(f"--floor {floor} is neither a number nor a file of evaluations") from None
    return recorded_floor(Path(floor), record)
