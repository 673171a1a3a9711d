"""How long work shows its progress: training, reading, sampling and measuring call one object."""

from collections.abc import Callable


class Progress:
    """Shows nothing; `cli.console.ConsoleProgress` shows it on a terminal. Called on rank 0."""

    def message(self, text: str) -> None:
        """Shows a line that stays."""

    def update(self, what: str, unit: str, done: int, total: int, note: str = "") -> None:
        """Shows that `done` of `total` units are done.

        Args:
            what: the work, such as "training"; another one than before starts a new bar.
            unit: what is counted, such as "steps".
            note: shown behind the bar, such as the loss.
        """

    def resume(self, what: str, unit: str, done: int, total: int) -> None:
        """Starts a bar with `done` units that were done earlier and that its rate leaves out."""

    def reading(self, unit: str) -> Callable[[int, int], None]:
        """A function of (done, total), such as `open_images` calls."""
        return lambda done, total: self.update("reading", unit, done, total)
