"""A run's folder: its paths, its lock, its recipe and its metrics."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dia_diffusion.errors import InputError
from dia_diffusion.io import FolderLock, append_json_line, remove_partial, step_folders, verify_checksum, write_text
from dia_diffusion.pipelines.folder import EVALUATIONS
from dia_diffusion.reading import Unreadable, complete_lines, parse_json


class RunFolder:
    """The paths of what a run writes."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.pipelines = self.path / "pipelines"
        self.classifiers = self.path / "classifiers"
        self.samples = self.path / "samples"
        self.evaluations = self.path / EVALUATIONS
        self._lock = FolderLock(self.path)

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint of the highest step."""
        return next(reversed(step_folders(self.checkpoints).values()), None)

    def lock(self) -> None:
        """Locks the folder for this process until `unlock` or its end.

        Raises:
            InputError: another process holds the lock, or the folder can't be written or locked.
        """
        self._lock.acquire()
        for folder in (self.path, self.checkpoints, self.pipelines, self.classifiers, self.samples):
            remove_partial(folder)  # left by a run that was killed while it wrote

    def lock_text(self) -> str:
        """The lock file's text, new each time the lock is acquired; ranks that share the folder read the same."""
        return self._lock.text()

    def unlock(self) -> None:
        """Releases the lock, if it is held."""
        self._lock.release()

    def write_config(self, experiment: Any) -> None:
        """Writes the recipe as resolved."""
        write_text(self.config, yaml.safe_dump(experiment.to_dict(), sort_keys=False))

    def truncate_metrics(self, step: int) -> None:
        """Drops the lines after `step`, which a resumed run writes again."""
        if self.metrics.is_file():
            kept = [text for text, line in _metric_lines(self.metrics) if line["step"] <= step]
            write_text(self.metrics, "".join(f"{text}\n" for text in kept))

    def log_metrics(self, values: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        append_json_line(self.metrics, values)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a crash truncated is left out.

    Raises:
        InputError: the file can't be read, or another line is corrupted or holds no numbers of a step.
    """
    return [line for _, line in _metric_lines(path)]


def _metric_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line as text, and parsed."""
    try:
        for number, text in enumerate(complete_lines(path), start=1):
            if (line := _metrics_in(text)) is None:
                raise InputError(f"{path}, line {number} is truncated or corrupted; remove that line")
            yield text, line
    except (OSError, Unreadable) as error:
        raise InputError(f"{path} can't be read as a run's metrics ({error})") from None


def _metrics_in(text: str) -> dict[str, Any] | None:
    """The numbers of a step in a line; None if there are none, or it is corrupted."""
    try:
        line = verify_checksum(parse_json(text))
    except ValueError:
        return None
    has_step = type(line.get("step")) is type(line.get("images")) is int
    return line if has_step and all(map(_is_number, line.values())) else None


def _is_number(value: Any) -> bool:
    """Whether it is None, or a finite number of at most 64 bits."""
    if type(value) is int:  # isinstance would accept a bool
        return abs(value) < 1 << 63
    return value is None or (type(value) is float and math.isfinite(value))


def logged_step(path: Path) -> int:
    """The step of a metrics.jsonl's last whole line, read from its end; 0 if there is none."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        try:
            return int(parse_json(line)["step"])
        except (ValueError, KeyError, TypeError, OverflowError):  # truncated, by the seek or a crash
            continue
    return 0
