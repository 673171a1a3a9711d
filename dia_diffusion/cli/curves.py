"""`dia-diffusion curves`: distance against images seen, a line a run (the form of the paper's Fig. 8)."""

from collections.abc import Sequence
from pathlib import Path

from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.console import console
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.curves import draw_curves
from dia_diffusion.evaluation.record import EvaluationRecord, read_records
from dia_diffusion.files import write_json
from dia_diffusion.training.run_folder import RunFolder


def run(arguments: Sequence[str]) -> None:
    """Draws what the arguments say."""
    parser = CommandParser("curves", "Draws distance against images seen for several runs that `fid` has measured.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders with evaluations.jsonl")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="the figure; its numbers lie beside it")
    parser.add_argument("--protocol", help="the start of a protocol's hash, where runs were measured by several")
    parser.add_argument(
        "--floor",
        metavar="FILE_or_DISTANCE",
        help="a line for what a perfect model would reach: a number, or the file that `fid` recorded real images in",
    )
    parser.add_argument("--title", help="above the figure")
    options = parser.parse_args(arguments)
    runs = [(label(run), records(run, options.protocol)) for run in options.runs]
    floor = None if options.floor is None else floor_of(options.floor, runs[0][1][0])
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
    compared = ("features", "features_hash", "reference_hash", "num_samples")
    told = ""
    for candidate in reversed(read_records(floor)):
        differences = candidate.protocol.differences(record.protocol)
        different = [name for name in compared if name in differences]
        if candidate.protocol.seeds is None and not different:
            return candidate.distance
        told = told or ", ".join(
            f"{name} {differences[name][0]} there, {differences[name][1]} here" for name in different
        )
    raise InputError(f"--floor {floor} has no images that were measured as the runs were: {told or 'only samples'}")
