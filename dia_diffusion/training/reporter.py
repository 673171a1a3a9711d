"""Where a run tells a person how it goes; the library itself prints nothing."""

from typing import Any, Protocol


class Reporter(Protocol):
    """Where a run tells a person how it goes; only the main process reports."""

    def message(self, text: str) -> None:
        """A line that stays."""

    def reading(self, unit: str, done: int, total: int) -> None:
        """So many of the images are read, or so many bytes of their download."""

    def progress(self, step: int, max_steps: int, values: dict[str, Any]) -> None:
        """A step is done; values are those of the last logged step."""
