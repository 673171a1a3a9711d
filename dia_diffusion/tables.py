"""A table, rendered by rich for the console, as Markdown, and by the template of the HTML page."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import rich.table


@dataclass(frozen=True)
class Table:
    """Cells of text, as many in each row as there are columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    left: Collection[str] = ("unit",)
    """Names of the columns that are flush left; numbers are flush right."""
    folded: bool = False
    """Whether the HTML page shows the title alone until it is clicked."""

    def without_empty_columns(self) -> "Table":
        """The table without the columns that are empty in all rows."""
        kept = [place for place in range(len(self.columns)) if any(row[place] for row in self.rows)]
        rows = [[row[place] for place in kept] for row in self.rows]
        return replace(self, columns=[self.columns[place] for place in kept], rows=rows)

    def to_rich(self) -> rich.table.Table:
        """For `console.print`."""
        table = rich.table.Table(box=None, pad_edge=False, title=self.title or None, title_justify="left")
        for name in self.columns:
            table.add_column(name, justify="left" if name in self.left else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """In GitHub's Markdown, without the title."""
        rule = ["---" if name in self.left else "---:" for name in self.columns]
        return "".join(f"| {' | '.join(line)} |\n" for line in (self.columns, rule, *self.rows))
