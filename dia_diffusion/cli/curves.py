"""`dia-diffusion curves`: distance against images seen, for a study, or one line per run (the paper's Fig. 8)."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from dia_diffusion.cli.console import console
from dia_diffusion.cli.options import Metavar, Positional, refuse_both, spell
from dia_diffusion.errors import InputError
from dia_diffusion.io import shipped_names, write_json
from dia_diffusion.validation import Strict

if TYPE_CHECKING:
    from dia_diffusion.evaluation.record import EvaluationRecord

OF_STUDIES = ("output", "data", "reference", "final_protocol", "jobs", "plan", "only_plot")
OF_RUNS = ("out", "floor", "title")


class Options(Strict):
    """Draws distance against images seen, for a study or for runs that `fid` measured."""

    subjects: Annotated[tuple[str, ...], Positional("STUDY_or_RUN")] = Field(
        description=f"A study: a YAML file, its folder, or one of {', '.join(shipped_names('curves'))}; or run folders "
        "with evaluations."
    )
    protocol: str | None = None
    """For a study: the protocol of its curves, by name or file; for runs measured by several: the start of its hash."""
    output: str | None = None
    """For a study: its folder; if not given, the one that the study names."""
    data: Annotated[str | None, Metavar("SOURCE")] = None
    """For a study: the images to train on; if not given, the recipe's data.source."""
    reference: Annotated[str | None, Metavar("DATA")] = None
    """For a study: the images to measure against; if not given, the training images."""
    final_protocol: Annotated[str | None, Metavar("NAME")] = None
    """For a study: the protocol of the last checkpoints, or none."""
    jobs: int = Field(1, ge=1)
    """For a study: parallel runs, which share the cores or have a GPU each."""
    plan: bool = False
    """For a study: only print what is missing, and what it would take."""
    only_plot: bool = False
    """For a study: only draw the existing results."""
    out: Path = Path("curves.png")
    """For runs: the figure; its numbers are written next to it."""
    floor: Annotated[str | None, Metavar("FILE_or_DISTANCE")] = None
    """For runs: a line at the distance of a perfect model: a number, or the file in which `fid` recorded real
    images."""
    title: str | None = None
    """For runs: the title above the figure."""

    @model_validator(mode="after")
    def _check(self) -> "Options":
        refuse_both(self, "plan", "only_plot")
        return self


def run(options: Options) -> None:
    """Draws the curves; for a study, first trains and measures what is missing."""
    is_study = len(options.subjects) == 1 and names_study(options.subjects[0])
    for name in OF_RUNS if is_study else OF_STUDIES:
        if getattr(options, name) != Options.model_fields[name].default:
            of = "a study" if is_study else "run folders"
            raise InputError(f"{spell(options, name)}: not an option of {of}; leave it out")
    if not is_study:
        _draw_runs(options)
        return
    from dia_diffusion.cli.study import run_study_command

    run_study_command(options)


def names_study(name: str) -> bool:
    """Whether a name is a study: not a folder, a study's folder, or a shipped study's name and not a run's folder."""
    from dia_diffusion.sweeps.sweep import STUDY_FILE
    from dia_diffusion.training.run_folder import RunFolder

    folder = RunFolder(name)
    is_run = folder.config.is_file() or folder.evaluations.is_file()
    return (
        not folder.path.is_dir()
        or (folder.path / STUDY_FILE).is_file()
        or (name in shipped_names("curves") and not is_run)
    )


def _draw_runs(options: Options) -> None:
    from dia_diffusion.evaluation.curves import draw_curves

    runs = [(Path(run).resolve().name, records(run, options.protocol)) for run in options.subjects]
    floor = None if options.floor is None else floor_of(options.floor, runs[0][1][0])
    points = draw_curves(runs, options.out, floor=floor, title=options.title)
    numbers = options.out.with_suffix(".json")
    write_json(numbers, points)
    console.print(f"{len(points)} points of {len(runs)} runs: {options.out}, numbers in {numbers}")


def records(run: str, protocol: str | None = None) -> "list[EvaluationRecord]":
    """A run's records; only those of one protocol if the start of its hash is given."""
    from dia_diffusion.evaluation.record import read_records
    from dia_diffusion.training.run_folder import RunFolder

    file = RunFolder(run).evaluations
    if not file.is_file():
        raise InputError(f"{run} has no evaluations.jsonl; `dia-diffusion fid {run} --every-step` makes it")
    chosen = [r for r in read_records(file) if protocol is None or r.protocol_hash().startswith(protocol)]
    if not chosen:
        raise InputError(f"{run} has no evaluations of protocol {protocol}")
    return chosen


def floor_of(floor: str, record: "EvaluationRecord") -> float:
    """A number, or the distance of the file's newest record that was measured in the same way as a run's record."""
    from dia_diffusion.evaluation.record import recorded_floor

    try:
        return float(floor)
    except ValueError:
        if not Path(floor).is_file():
            raise InputError(f"`--floor` must be a number or a file of evaluations, got {floor}") from None
    return recorded_floor(Path(floor), record)
