"""A study's tables on the terminal."""

import rich.table

from dia_diffusion.cli.console import console
from dia_diffusion.studies.results import Results
from dia_diffusion.studies.table import LEFT_ALIGNED


def print_results(results: Results) -> None:
    """The tables of results.md and the notes below them."""
    for told in results.tables:
        table = rich.table.Table(box=None, pad_edge=False, title=told.title, title_justify="left")
        for name in told.columns:
            table.add_column(name, justify="left" if name in LEFT_ALIGNED else "right")
        for row in told.rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    for note in results.notes:
        console.print(note)
