"""`dia-diffusion params`: the parameters that attention units add, shared and individual; the paper's own counts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from dia_diffusion.cli.console import console
from dia_diffusion.cli.options import Metavar
from dia_diffusion.errors import InputError
from dia_diffusion.tables import Table
from dia_diffusion.validation import Strict

if TYPE_CHECKING:
    from dia_diffusion.analysis.paper_parameters import Cell

MILLION = 1_000_000


class Options(Strict):
    """Counts the parameters that attention units add to models, shared and with a module per block."""

    model: Annotated[tuple[str, ...], Metavar("NAME")] = ("S/2", "cifar-resnet83", "cifar-resnet164")
    """UViT sizes (S/2), classifiers (cifar-resnet164, cifar-wrn52-4, resnet50, vit_s_16), recipes."""
    unit: Annotated[tuple[str, ...] | None, Metavar("NAME")] = None
    """Attention units; all if not given."""
    kwargs: Annotated[dict[str, Any], Metavar("YAML")] = Field(default_factory=dict)
    """Further arguments of the units: '{reduction: 8}'."""
    table: Annotated[tuple[str, ...] | None, Metavar("NUMBER")] = None
    """Print tables of the paper instead, by Roman numeral such as IV, or all."""


def run(options: Options) -> None:
    """Prints the counts."""
    if options.table is None:
        print_added(options.model, options.unit, options.kwargs)
        return
    from dia_diffusion.analysis.paper_parameters import PAPER_TABLES

    chosen = [*PAPER_TABLES] if options.table == ("all",) else options.table
    if unknown := next((number for number in chosen if number not in PAPER_TABLES), None):
        raise InputError(f"`--table` must be one of {', '.join(PAPER_TABLES)}, all, got {unknown!r}")
    print_paper([cell for number in chosen for cell in PAPER_TABLES[number]])


def print_added(models: Sequence[str], units: Sequence[str] | None, options: dict[str, object]) -> None:
    """Prints a row for each model and unit; None: all units."""
    from dia_diffusion.analysis.parameters import added_parameters, count_parameters, model_named
    from dia_diffusion.analysis.stages import stages_of
    from dia_diffusion.attention import UNITS

    if reserved := {"name", "channels", "num_blocks", "unit", "stages"} & options.keys():
        raise InputError(f"`--kwargs` must not have {min(reserved)}, which the model or --unit sets")
    columns = ["model", "stages", "parameters", "unit", "shared adds", "individual adds", "sharing saves"]
    rows = []
    for name in models:
        model = model_named(name)
        stages = stages_of(model)
        first_cells = [name, " ".join(f"{len(s.blocks)}x{s.channels}" for s in stages), f"{count_parameters(model):,}"]
        for unit in UNITS if units is None else units:
            added = added_parameters(stages, unit, **options)
            individual = "-" if added.individual is None else f"{added.individual:,}"
            saving = "-" if added.saving is None else f"{100 * added.saving:.1f} %"
            rows.append([*first_cells, unit, f"{added.shared:,}", individual, saving])
            first_cells = [""] * len(first_cells)
    console.print(Table(columns, rows, left=("model", "stages", "unit")).to_rich())


def print_paper(cells: "Sequence[Cell]") -> None:
    """Prints a row for each count in the paper, with ours, in millions."""
    columns = ["table", "backbone", "model", "paper", "ours", "difference", "parameters", "unit's arguments"]
    rows, differing = [], 0
    for cell in cells:
        parameters = paper_count(cell)
        ours = round(parameters / MILLION, 2)
        difference = round(ours - cell.printed, 2)
        differing += difference != 0
        marked = f"{difference:+.2f}" if difference else "0"
        counts = [f"{cell.printed:.2f}", f"{ours:.2f}", marked, f"{parameters:,}"]
        options = ", ".join(_short(key, value) for key, value in cell.options.items())
        rows.append([cell.table, cell.backbone, cell.model, *counts, options])
    console.print(Table(columns, rows, left=("table", "backbone", "model", "unit's arguments")).to_rich())
    console.print(f"\n{len(cells) - differing} of {len(cells)} printed counts are reproduced to the digit.")


def _short(key: str, value: object) -> str:
    """A unit's argument in short form."""
    if isinstance(value, bool):
        return key if value else f"no {key}"
    return {"sharing": f"{value}", "reduction": f"r {value}"}.get(key, f"{key} {value}")


def paper_count(cell: "Cell") -> int:
    """The parameters of a cell's network."""
    from dia_diffusion.analysis.paper_parameters import paper_backbone
    from dia_diffusion.analysis.parameters import count_parameters, unit_parameters
    from dia_diffusion.analysis.stages import stages_of

    backbone = paper_backbone(cell.backbone)
    stages = stages_of(backbone)
    carrying = [stages[index] for index in cell.stages]
    return count_parameters(backbone) + unit_parameters(carrying, cell.unit, **cell.options)
