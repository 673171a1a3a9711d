"""Tables from which recipes and options choose by name; importing a module adds its rows."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

from dia_diffusion.errors import InputError

Row = TypeVar("Row")


class Registry(Mapping[str, Row]):
    """Rows by name, in the order of registration.

    Args:
        kind: what a row is, for error messages, such as "sampler".
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._rows: dict[str, Row] = {}

    def register(self, name: str, row: Row) -> Row:
        """Adds a row and returns it.

        Raises:
            ValueError: the name is taken by another row.
        """
        if self._rows.setdefault(name, row) is not row:
            raise ValueError(f"{self.kind} {name!r} is registered already")
        return row

    def choose(self, name: str, option: str) -> Row:
        """The row of this name.

        Args:
            option: the recipe key or command-line option that the name was given for.

        Raises:
            InputError: there is no such row.
        """
        if name not in self._rows:
            raise InputError(f"`{option}` must be one of {', '.join(self)}, got {name!r}")
        return self._rows[name]

    def __getitem__(self, name: str) -> Row:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
