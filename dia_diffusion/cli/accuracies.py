"""`dia-diffusion accuracies`: compares trained classifiers, with tests against a baseline and a figure."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dia_diffusion.cli.console import console
from dia_diffusion.cli.options import Metavar, Positional
from dia_diffusion.io import refuse_existing, write_json, write_text
from dia_diffusion.tables import Table
from dia_diffusion.validation import Strict

if TYPE_CHECKING:
    from dia_diffusion.sweeps.accuracies import Row

COLUMNS = [
    "setting",
    "unit",
    "parameters",
    "seeds",
    "accuracy",
    "sd",
    "difference",
    "p",
    "p (Holm)",
    "diverged at step",
]


class Options(Strict):
    """Compares the test accuracies of classifiers, over seeds."""

    runs: Annotated[tuple[str, ...], Positional("RUN")]
    """Finished runs of classify."""
    baseline: Annotated[str, Metavar("UNIT")] = "none"
    """The unit that the others are tested against."""
    out: Annotated[Path | None, Metavar("DIR")] = None
    """A new folder for the table, figure and numbers."""


def run(options: Options) -> None:
    """Prints the table, and writes it with its figure."""
    from dia_diffusion.sweeps.accuracies import compare, read_result
    from dia_diffusion.sweeps.figures import draw_accuracies

    if options.out is not None:
        refuse_existing(options.out)
    rows = compare([read_result(run) for run in options.runs], options.baseline)
    table = Table(COLUMNS, [_cells(row) for row in rows], left=("setting", "unit")).without_empty_columns()
    console.print(table.to_rich())
    if options.out is None:
        return
    options.out.mkdir(parents=True)
    write_json(options.out / "accuracies.json", {"baseline": options.baseline, "rows": [row.to_dict() for row in rows]})
    write_text(options.out / "accuracies.md", table.to_markdown())
    draw_accuracies(rows, options.out / "accuracies.png")
    console.print(f"{options.out}: accuracies.md, accuracies.json, accuracies.png")


def _cells(row: "Row") -> list[str]:
    return [
        row.setting,
        row.unit,
        f"{row.parameters:,}",
        str(len(row.results)),
        _number(row.mean, "{:.2%}"),
        _number(row.deviation, "{:.2%}"),
        _number(row.difference, "{:+.2%}"),
        _number(row.p, "{:.3g}"),
        _number(row.p_holm, "{:.3g}"),
        ", ".join(map(str, row.diverged_at)),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
