"""Progress on a terminal: bars with rates and time left, or an occasional line if there is no terminal."""

import os
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from dia_diffusion.progress import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # BrokenPipeError, which `cli.main` handles as if print had raised it


console = _Console(highlight=False, markup=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 140  # for a file or pipe, where rich assumes 80 and wraps tables
SECONDS_BETWEEN_LINES = 20.0


class RateColumn(ProgressColumn):
    """Units per second."""

    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self.unit}/s")


def progress_bars(unit: str) -> Bars:
    """Bars counted in `unit`, with rate and time left; nothing is drawn without a terminal."""
    return Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(unit),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        speed_estimate_period=20,
        # Only the first process of a launch draws.
        disable=not console.is_terminal or os.environ.get("RANK", "0") != "0",
    )


class RecentRate:
    """Progress per second over the last minute; time before the first progress, such as imports, doesn't count."""

    SECONDS = 60.0
    ENOUGH_SECONDS = 5.0

    def __init__(self) -> None:
        self.points: deque[tuple[float, int]] = deque()

    def note(self, seconds: float, done: int) -> None:
        """Records the time at which `done` was reached; does nothing if `done` hasn't changed since the last call."""
        if self.points and done == self.points[-1][1]:
            return
        self.points.append((seconds, done))
        while len(self.points) > 2 and self.points[1][0] < seconds - self.SECONDS:
            self.points.popleft()

    def rate(self) -> float | None:
        """Per second; None until it is known."""
        if not self.points:
            return None
        (first, before), (last, done) = self.points[0], self.points[-1]
        return (done - before) / (last - first) if last - first >= self.ENOUGH_SECONDS else None


class Counter:
    """One bar, or occasional lines if there is no terminal; call it with (done, total)."""

    def __init__(self, description: str, unit: str):
        self.description, self.unit = description, unit
        self.bars = progress_bars(unit)
        self.task = self.bars.add_task(description, total=None, note="")
        self.started = self.last_line = time.monotonic()
        self.first, self.finished, self.recent = 0, False, RecentRate()

    def __enter__(self) -> "Counter":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def start_at(self, done: int, total: int) -> None:
        """Starts at `done` of `total`; the rate doesn't count what was done earlier."""
        self.first, self.started, self.recent = done, time.monotonic(), RecentRate()
        self.bars.reset(self.task, total=total, completed=done, note="")

    def __call__(self, done: int, total: int, note: str = "") -> None:
        self.bars.update(self.task, completed=done, total=total, note=note)
        now = time.monotonic()
        if done > self.first:
            self.recent.note(now, done)
        finished = done == total and not self.finished
        if not console.is_terminal and (now - self.last_line > SECONDS_BETWEEN_LINES or finished):
            self.last_line, self.finished = now, finished
            speed = "estimating"
            if finished:
                speed = f"{(done - self.first) / max(now - self.started, 1e-9):.1f} {self.unit}/s"
            elif rate := self.recent.rate():
                speed = f"{rate:.1f} {self.unit}/s, {(total - done) / rate:.0f} s left"
            console.print(f"{self.description}: {done:,}/{total:,} {self.unit}, {speed} {note}".rstrip())


class SharedProgress:
    """Counts the work of all processes on the main process's counter, assuming that each does as much as the main."""

    def __init__(self, counter: Counter, total: int, accelerator: "Accelerator"):
        self.counter, self.total, self.accelerator, self.done = counter, total, accelerator, 0.0

    def __call__(self, amount: float) -> None:
        self.done += amount * self.accelerator.num_processes
        if self.accelerator.is_main_process:
            self.counter(min(round(self.done), self.total), self.total)


class ConsoleProgress(Progress):
    """Progress on the terminal, one bar at a time."""

    def __init__(self) -> None:
        self.counter: Counter | None = None

    def message(self, text: str) -> None:
        console.print(text)

    def update(self, what: str, unit: str, done: int, total: int, note: str = "") -> None:
        self._open(what, unit)(done, total, note)

    def reading(self, unit: str) -> Callable[[int, int], None]:
        def update(done: int, total: int) -> None:
            self.update("reading", unit, done, total)
            if done >= total:
                self.close()

        return update

    def resume(self, what: str, unit: str, done: int, total: int) -> None:
        self._open(what, unit).start_at(done, total)

    def _open(self, what: str, unit: str) -> Counter:
        if self.counter is None or (self.counter.description, self.counter.unit) != (what, unit):
            self.close()
            self.counter = Counter(what, unit)
            self.counter.bars.start()
        return self.counter

    def close(self) -> None:
        """Restores the terminal."""
        if self.counter is not None:
            self.counter.bars.stop()
            self.counter = None

    def __enter__(self) -> "ConsoleProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
