"""A table that can be rendered by rich for the console, as Markdown, and by the HTML page's template."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import rich.table


@dataclass(frozen=True)
class Table:
    """Rows of text, one cell per column."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    left: Collection[str] = ("unit",)
    """Names of the left-aligned columns; numbers are right-aligned."""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, str]], title: str = "", **how: Any) -> "Table":
        """A table of rows given as column -> cell, without the columns that are empty in all rows."""
        columns = list(dict.fromkeys(name for row in rows for name in row))
        cells = [[row.get(name, "") for name in columns] for row in rows]
        return cls(columns, cells, title, **how).without_empty_columns()

    def without_empty_columns(self) -> "Table":
        """The table without the columns that are empty in all rows."""
        kept = [place for place in range(len(self.columns)) if any(row[place] for row in self.rows)]
        rows = [[row[place] for place in kept] for row in self.rows]
        return replace(self, columns=[self.columns[place] for place in kept], rows=rows)

    def to_rich(self) -> rich.table.Table:
        """The table for `console.print`."""
        table = rich.table.Table(box=None, pad_edge=False, title=self.title or None, title_justify="left")
        for name in self.columns:
            table.add_column(name, justify="left" if name in self.left else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """The table in GitHub's Markdown, without the title."""
        rule = ["---" if name in self.left else "---:" for name in self.columns]
        return "".join(f"| {' | '.join(line)} |\n" for line in (self.columns, rule, *self.rows))
