"""The progress of long work: training, reading, sampling and evaluation report to one object."""

from collections.abc import Callable

Advance = Callable[[float], None]
"""Called with the number of images made since the last call, which may be fractional."""


class Progress:
    """Shows nothing; `cli.console.ConsoleProgress` shows it on a terminal. Called on rank 0."""

    def message(self, text: str) -> None:
        """Shows a permanent line."""

    def update(self, what: str, unit: str, done: int, total: int, note: str = "") -> None:
        """Shows that `done` of `total` units are done.

        Args:
            what: the work, such as "training"; a different value than before starts a new bar.
            unit: what is counted, such as "steps".
            note: shown behind the bar, such as the loss.
        """

    def resume(self, what: str, unit: str, done: int, total: int) -> None:
        """Starts a bar at `done` units that were done earlier; its rate doesn't count them."""

    def reading(self, unit: str) -> Callable[[int, int], None]:
        """A callback (done, total) for functions such as `open_images`."""
        return lambda done, total: self.update("reading", unit, done, total)
