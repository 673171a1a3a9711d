"""`dia-diffusion params`: the parameters that attention units add, shared and individual; the paper's own counts."""

from collections.abc import Sequence

import yaml
from rich.table import Table

from dia_diffusion.analysis.paper_parameters import PAPER_TABLES, Cell
from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.console import console
from dia_diffusion.cli.imports import imports
from dia_diffusion.errors import InputError

MILLION = 1_000_000
DEFAULT_MODELS = ("S/2", "cifar-resnet83", "cifar-resnet164")


def run(arguments: Sequence[str]) -> None:
    """Counts what the arguments name."""
    parser = CommandParser(
        "params",
        "Counts the parameters that attention units add to models, shared and with a module of its own a block.",
    )
    parser.add_argument(
        "--model",
        nargs="+",
        default=DEFAULT_MODELS,
        metavar="NAME",
        help="UViT sizes (S/2), classifiers (cifar-resnet164, cifar-wrn52-4, resnet50, vit_s_16), recipes",
    )
    parser.add_argument("--unit", nargs="+", metavar="NAME", help="attention units; all if none")
    parser.add_argument(
        "--kwargs", default="{}", metavar="YAML", help="further arguments of the units: '{reduction: 8}'"
    )
    parser.add_argument(
        "--table", nargs="+", metavar="NUMBER", help=f"instead, tables of the paper: {', '.join(PAPER_TABLES)}, or all"
    )
    options = parser.parse_args(arguments)
    if options.table is None:
        print_added(options.model, options.unit, _kwargs(options.kwargs))
        return
    chosen = [*PAPER_TABLES] if options.table == ["all"] else options.table
    if unknown := next((number for number in chosen if number not in PAPER_TABLES), None):
        raise InputError(f"no table {unknown!r} counts parameters; accepted: {', '.join(PAPER_TABLES)}, or all")
    print_paper([cell for number in chosen for cell in PAPER_TABLES[number]])


def _kwargs(text: str) -> dict[str, object]:
    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError:
        parsed = None
    if not isinstance(parsed, dict) or not all(isinstance(key, str) for key in parsed):
        raise InputError(f"--kwargs is {text!r}; accepted: names and values, such as '{{reduction: 8}}'")
    return parsed


def print_added(models: Sequence[str], units: Sequence[str] | None, options: dict[str, object]) -> None:
    """A row for each model and unit; None is all units."""
    with imports():
        from dia_diffusion.analysis.named_models import model_named
        from dia_diffusion.analysis.parameters import added_parameters, count_parameters, stages_of
        from dia_diffusion.attention import UNITS
    table = Table(box=None, pad_edge=False)
    for name in ("model", "stages", "parameters", "unit", "shared adds", "individual adds", "sharing saves"):
        table.add_column(name, justify="left" if name in ("model", "stages", "unit") else "right")
    for name in models:
        model = model_named(name)
        stages = stages_of(model)
        told = [name, " ".join(f"{s.blocks}x{s.channels}" for s in stages), f"{count_parameters(model):,}"]
        for unit in UNITS if units is None else units:
            added = added_parameters(stages, unit, **options)
            table.add_row(
                *told,
                unit,
                f"{added.shared:,}",
                "-" if added.individual is None else f"{added.individual:,}",
                "-" if added.saving is None else f"{100 * added.saving:.1f} %",
            )
            told = [""] * len(told)
    console.print(table)


def print_paper(cells: Sequence[Cell]) -> None:
    """A row for each printed count, with ours, in millions."""
    table = Table(box=None, pad_edge=False)
    for name in ("table", "backbone", "model", "paper", "ours", "difference", "parameters", "unit's arguments"):
        table.add_column(name, justify="right" if name in ("paper", "ours", "difference", "parameters") else "left")
    differing = 0
    for cell in cells:
        parameters = paper_count(cell)
        ours = round(parameters / MILLION, 2)
        difference = round(ours - cell.printed, 2)
        differing += difference != 0
        marked = f"{difference:+.2f}" if difference else "0"
        table.add_row(
            cell.table,
            cell.backbone,
            cell.model,
            f"{cell.printed:.2f}",
            f"{ours:.2f}",
            marked,
            f"{parameters:,}",
            ", ".join(_told(key, value) for key, value in cell.options.items()),
        )
    console.print(table)
    console.print(f"\n{len(cells) - differing} of {len(cells)} printed counts are ours to the digit.")


def _told(key: str, value: object) -> str:
    """An argument of a unit, in short."""
    if isinstance(value, bool):
        return key if value else f"no {key}"
    return {"sharing": f"{value}", "reduction": f"r {value}"}.get(key, f"{key} {value}")


def paper_count(cell: Cell) -> int:
    """The parameters of a cell's network."""
    with imports():
        from dia_diffusion.analysis.named_models import paper_backbone
        from dia_diffusion.analysis.parameters import count_parameters, stages_of, unit_parameters
    backbone = paper_backbone(cell.backbone)
    stages = stages_of(backbone)
    carrying = [stages[index] for index in cell.stages]
    return count_parameters(backbone) + unit_parameters(carrying, cell.unit, **cell.options)
