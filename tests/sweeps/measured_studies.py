"""Study folders with the records and metrics of training and measuring, written without doing either."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import EvaluationRecord, Origin, ResolvedProtocol, append_record, make_record
from dia_diffusion.sweeps.collect import Point, measured
from dia_diffusion.sweeps.sweep import Run, Study, read_study
from dia_diffusion.training.run_folder import RunFolder

PROTOCOL = """
features: digits
num_samples: 596
sampler: dpmsolver++
steps: 25
precision: float32
weights: ema
reference_split: test
"""

Distances = Callable[[Run, int], float | None]
"""The distance of a run at a step; None: not measured."""


def make_study(
    folder: Path,
    *,
    units: Sequence[str] = ("none", "dia-lstm"),
    batch_sizes: Sequence[int] = (8, 32),
    seeds: Sequence[int] = (0, 1, 2),
    steps: dict[int, int] | int = 600,
    points: int = 3,
    final: bool = False,
    **keys: Any,
) -> Study:
    """A study of the digits in `folder` without any runs yet; its protocol is `curve`, its final one `end` if `final`.

    keys: other keys of the study.
    """
    for name, samples in (("curve", 596), ("end", 1000)):
        (folder / f"{name}.yaml").write_text(PROTOCOL.replace("596", str(samples)))
    values = {
        "output": str(folder / "study"),
        "recipe": "digits_uvit_cpu",
        "runs": [{"units": [*units], "batch_sizes": [*batch_sizes], "seeds": [*seeds]}],
        "steps": steps,
        "points": points,
        "protocol": str(folder / "curve.yaml"),
        "final_protocol": str(folder / "end.yaml") if final else None,
        **keys,
    }
    (folder / "tiny.yaml").write_text(json.dumps(values))
    return read_study(str(folder / "tiny.yaml"))


def add_records(study: Study, distances: Distances, *, protocol: str = "curve", **changes: Any) -> None:
    """Adds records under a protocol at every point of every run; `changes` modify the resolved protocol."""
    named = EvalProtocol.read(str(study.folder.parent / f"{protocol}.yaml"))
    for run in study.runs:
        for step in run.steps if protocol == "curve" else run.steps[-1:]:
            distance = distances(run, step)
            if distance is not None:
                record = dataclasses.replace(
                    a_record(run, step, distance, num_samples=named.num_samples, **changes),
                    protocol_name=named.name,
                    protocol_file_hash=named.hash(),
                )
                append_record(RunFolder(run.folder).evaluations, record)


def points_of(study: Study) -> list[Point]:
    """The points of the study's curves."""
    return [one.point for one in measured(study.runs, study.protocol)]


def add_metrics(study: Study, seconds: Callable[[Run], float], memory: int | None = 900) -> None:
    """Adds metrics of complete trainings that took `seconds`, two lines each."""
    for run in study.runs:
        last = run.experiment.train.max_steps
        for step in (last // 3, last):
            part = step if step < last else last - last // 3
            rate = part * run.batch_size / (seconds(run) * part / last)
            line = {"step": step, "images": step * run.batch_size, "images_per_second": rate}
            RunFolder(run.folder).log_metrics(line | ({} if memory is None else {"peak_memory_mib": memory + step}))


def a_record(run: Run, step: int, distance: float, **changes: Any) -> EvaluationRecord:
    """One record of a run, without a protocol name."""
    fields: dict[str, Any] = {
        "features": "digits",
        "features_hash": "f" * 64,
        "reference": "digits",
        "reference_split": "test",
        "reference_shape": (1, 8, 8),
        "reference_count": 596,
        "reference_hash": "e" * 64,
        "num_samples": 596,
        "seeds": "0-595",
        "sampler": "dpmsolver++",
        "num_inference_steps": 25,
        "weights": "ema",
        "dtype": "float32",
    }
    origin = Origin(
        source=run.name,
        run=run.name,
        step=step,
        images_seen=step * run.batch_size,
        unit=run.experiment.model.attention,
        batch_size=run.batch_size,
        seed=run.seed,
        weights_hash="d" * 64,
    )
    return make_record(distance, ResolvedProtocol(**fields | changes), origin, seconds=1.25)
