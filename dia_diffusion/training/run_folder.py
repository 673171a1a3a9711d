"""A run's folder: its paths, lock, recipe and metrics, and checks before a run starts or resumes in it."""

import math
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from dia_diffusion.distributed import broadcast_from_rank_zero, on_all_ranks
from dia_diffusion.errors import InputError
from dia_diffusion.io import append_json_line, remove_partial, step_folders, verify_checksum, write_text
from dia_diffusion.locks import FolderLock
from dia_diffusion.pipelines.folder import EVALUATIONS, TRAINING_FILE
from dia_diffusion.reading import Unreadable, complete_lines, parse_json, read_json_object
from dia_diffusion.training.randomness import RANDOMNESS
from dia_diffusion.training.recipe import changed_keys, command_of


class RunFolder:
    """The paths of a run's files."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.pipelines = self.path / "pipelines"
        self.classifiers = self.path / "classifiers"
        self.samples = self.path / "samples"
        self.snapshots = self.path / "snapshots"
        self.averages = self.path / "averages"
        self.evaluations = self.path / EVALUATIONS
        self._lock = FolderLock(self.path)

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint with the highest step."""
        return next(reversed(step_folders(self.checkpoints).values()), None)

    def lock(self) -> None:
        """Locks the folder for this process until `unlock` or its end.

        Raises:
            InputError: another process holds the lock, or the folder can't be written or locked.
        """
        self._lock.acquire()
        for folder in (self.path, self.checkpoints, self.pipelines, self.classifiers, self.samples, self.snapshots):
            remove_partial(folder)  # left by a run that was killed while writing

    def lock_text(self) -> str:
        """The lock file's text, new each time the lock is acquired; ranks that share the folder read the same."""
        return self._lock.text()

    def unlock(self) -> None:
        """Releases the lock, if it is held."""
        self._lock.release()

    def write_config(self, experiment: Any) -> None:
        """Writes the resolved recipe."""
        write_text(self.config, yaml.safe_dump(experiment.to_dict(), sort_keys=False))

    def truncate_metrics(self, step: int) -> None:
        """Drops the lines after `step`, which a resumed run writes again."""
        if self.metrics.is_file():
            kept = [text for text, line in _metric_lines(self.metrics) if line["step"] <= step]
            write_text(self.metrics, "".join(f"{text}\n" for text in kept))

    def drop_snapshots(self, step: int) -> None:
        """Removes the snapshots of averages after `step`, which a resumed run writes again."""
        for number, place in step_folders(self.snapshots).items():
            if number > step:
                shutil.rmtree(place)

    def log_metrics(self, values: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        append_json_line(self.metrics, values)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last line that a crash truncated.

    Raises:
        InputError: the file can't be read, or another line is corrupted or doesn't hold a step's numbers.
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
    """The step of a metrics.jsonl's last complete line, read from the end of the file; 0 if there is none."""
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


SECONDS_TO_SEE_A_FILE = 90.0
"""How long it may take until one machine sees what another wrote to a shared disk. NFS caches for 30 to 60 s (acdirmax)
that a file doesn't exist."""
SECONDS_UNTIL_MESSAGE = 10.0


def check_shared(folder: RunFolder, accelerator: Accelerator, message: Callable[[str], None]) -> None:
    """Raises InputError on all ranks if one of them sees a different folder than rank 0, which holds the lock.

    message: shows a line if a rank has to wait for a slow shared disk.
    """
    lock = broadcast_from_rank_zero(accelerator, folder.lock_text)

    def check() -> None:
        started, reported = time.monotonic(), False
        while folder.lock_text() != lock:
            waited = time.monotonic() - started
            if waited > SECONDS_TO_SEE_A_FILE:
                what = "output must be on a disk that all machines share"
                raise InputError(f"{what}, got {folder.path}, which differs between them")
            if waited > SECONDS_UNTIL_MESSAGE and not reported:
                seconds = round(SECONDS_TO_SEE_A_FILE)
                message(f"waiting up to {seconds} s for {folder.path} to appear on {socket.gethostname()}")
                reported = True
            time.sleep(0.5)

    on_all_ranks(accelerator, check)


def check_resumed_run(path: Path, experiment: Any, fingerprint: str, state: dict[str, Any]) -> None:
    """Raises InputError if a run can't resume with this recipe and these images from a checkpoint with this state."""
    refuse_changes(state["recipe"], experiment, path)
    if state["step"] < experiment.train.max_steps:
        refuse_other_randomness(state, path)
    if state["data"]["fingerprint"] != fingerprint:
        raise InputError(f"data.source {experiment.data.source} has other images than {path} was trained on")


def refuse_changes(old: dict[str, Any], experiment: Any, path: Path) -> None:
    """Raises InputError if keys of a run's recipe changed that may not change on resuming."""
    if (command := command_of(old)) != experiment.COMMAND:
        raise InputError(f"{path} holds a run of dia-diffusion {command}; choose another output")
    changed = changed_keys(old, experiment)
    if changed:
        raise InputError(
            f"{path} holds a run of another recipe ({'; '.join(changed)}); "
            "resume it with its own recipe, or choose another output"
        )


def refuse_other_randomness(origin: dict[str, Any], path: Path) -> None:
    """Raises InputError if a run began with another version's random streams.

    origin: a checkpoint's state, a pipeline's training.json or a trial's result; without an entry it is version 1.
    """
    version = origin.get("randomness", 1)
    if version != RANDOMNESS:
        raise InputError(
            f"{path} was trained with randomness {version}, and this version of dia-diffusion trains with randomness "
            f"{RANDOMNESS} (other image order, noise and augmentation); finish it with the version that began it, or "
            "choose another output (dia-diffusion train --init-from starts from its weights)"
        )


def check_new_run(folder: RunFolder, experiment: Any) -> None:
    """Raises InputError if a new run would overwrite pipelines or classifiers of a run without checkpoints.

    A run that was killed between its first pipeline and its first checkpoint starts again and writes the same one.
    """
    first = min(experiment.train.checkpoint_every, experiment.train.max_steps)
    for made in (folder.pipelines, folder.classifiers):
        places = step_folders(made)
        if places and not (places.keys() == {first} and _is_recipe_of(experiment, places[first])):
            raise InputError(
                f"{folder.path} has {made.name} and no checkpoint to resume from, and a new run would overwrite them; "
                "choose another output"
            )


def _is_recipe_of(experiment: Any, place: Path) -> bool:
    """Whether a new run of this recipe would write the same pipeline or classifier; old recipes lack newer keys."""
    try:
        training = read_json_object(place / TRAINING_FILE)
        same_recipe = not changed_keys(training["recipe"], experiment, may_change=frozenset())
        return same_recipe and training.get("randomness", 1) == RANDOMNESS
    except (OSError, ValueError, KeyError, AttributeError):
        return False
