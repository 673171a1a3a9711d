"""What training a run took, by its metrics.jsonl."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dia_diffusion.sweeps.study import StudyRun
from dia_diffusion.training.run_folder import RunFolder, read_metrics


@dataclass(frozen=True)
class Cost:
    """Of one whole training."""

    seconds: float
    """Of the logged steps: grids, checkpoints and pauses left out."""
    peak_memory_mib: int | None
    """The GPU's on a GPU, else the process's; None for a run that didn't log it."""


def training_cost(run: StudyRun) -> Cost | None:
    """The cost of a run's training; None while it isn't finished."""
    file = RunFolder(run.folder).metrics
    lines, train = read_metrics(file) if file.is_file() else [], run.experiment.train
    last_logged = train.max_steps // train.log_every * train.log_every
    if not lines or lines[-1]["step"] < last_logged:
        return None
    memory = [line["peak_memory_mib"] for line in lines if line.get("peak_memory_mib") is not None]
    return Cost(training_seconds(lines), max(memory, default=None))


def training_seconds(lines: Sequence[dict[str, Any]]) -> float:
    """What logged steps took, images over rate: a line's rate is that of the images since the one before."""
    seconds, before = 0.0, 0
    for line in lines:
        if rate := line.get("images_per_second"):  # a line of a distance or a test has none
            seconds += (line["images"] - before) / rate
            before = line["images"]
    return seconds
