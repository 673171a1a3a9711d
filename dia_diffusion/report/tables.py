"""Tables of what was measured, how, and where."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from dia_diffusion.environment import environment
from dia_diffusion.evaluation.record import EvaluationRecord, ResolvedProtocol
from dia_diffusion.reading import Unreadable, read_json_object
from dia_diffusion.report.page import Table
from dia_diffusion.training.run_folder import RunFolder


def protocol_label(record: EvaluationRecord) -> str:
    """The start of its hash, and its name where it has one."""
    return " ".join(filter(None, (record.protocol_hash()[:8], record.protocol_name)))


def protocols_table(records: Sequence[EvaluationRecord]) -> Table:
    """One row a protocol, in order of first use."""
    columns = ["protocol", "metric", "samples", "reference", "sampler", "weights", "seeds", "labels"]
    rows = {}
    for record in records:
        protocol = record.protocol
        rows[record.protocol_hash()] = [
            protocol_label(record),
            record.metric,
            f"{protocol.num_samples:,}",
            _reference(protocol),
            _sampler(protocol),
            ", ".join(filter(None, (protocol.weights, protocol.dtype))),
            protocol.seeds or "",
            _labels(protocol),
        ]
    if not any(row[-1] for row in rows.values()):
        columns, rows = columns[:-1], {key: row[:-1] for key, row in rows.items()}
    caption = "Protocols. Distances of different protocols can't be compared."
    return Table(columns, list(rows.values()), caption, numbers={"samples"})


def results_table(records: Sequence[EvaluationRecord]) -> Table:
    """One row a record, in order of step; further metrics have columns of their own."""
    names = list(dict.fromkeys(n for record in records for n in record.metrics if not n.endswith(" std")))
    columns = ["step", "images seen", "metric", "distance", "95 % interval", *names, "seconds", "protocol"]
    rows = []
    for record in sorted(records, key=lambda record: (record.step or 0, record.time)):
        rows.append(
            [
                _count(record.step),
                _count(record.images_seen),
                record.metric,
                f"{record.distance:.3f}",
                interval(record.low, record.high),
                *(_metric(record, name) for name in names),
                f"{record.seconds:,.0f}",
                protocol_label(record),
            ]
        )
    numbers = {"step", "images seen", "distance", "95 % interval", *names, "seconds"}
    return Table(columns, rows, "Every evaluation on record.", numbers)


def environment_table(folders: Iterable[Path], records: Iterable[EvaluationRecord]) -> Table:
    """What runs were trained with when they last went on, distances measured with, and this page made with."""
    columns = {
        "training": _distinct(map(_environment_of, folders)),
        "evaluations": _distinct(record.versions for record in records),
        "this page": [environment()],
    }
    names = [f"{name} ({n + 1})" if n else name for name, found in columns.items() for n in range(len(found))]
    described = [one for found in columns.values() for one in found]
    rows = [[key, *(one.get(key, "not on record") for one in described)] for key in environment()]
    return Table(["", *names], rows, "What was trained, measured and shown with.")


def _environment_of(run: Path) -> dict[str, str]:
    try:
        values = read_json_object(RunFolder(run).environment)
    except (OSError, Unreadable):
        return {}  # an older run
    return {name: str(value) for name, value in values.items()}


def _distinct(found: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    return list({tuple(one.items()): one for one in found}.values())


def interval(low: float | None, high: float | None) -> str:
    """As "[0.641, 0.702]"; nothing where there is none."""
    return "" if low is None or high is None else f"[{low:.3f}, {high:.3f}]"


def _reference(protocol: ResolvedProtocol) -> str:
    shape = protocol.reference_shape
    return ", ".join(
        filter(
            None,
            (
                protocol.reference,
                protocol.reference_split,
                _count(protocol.reference_count),
                "x".join(map(str, shape[1:])) if shape else "",
            ),
        )
    )


def _sampler(protocol: ResolvedProtocol) -> str:
    return "" if protocol.sampler is None else f"{protocol.sampler}, {protocol.num_inference_steps} steps"


def _labels(protocol: ResolvedProtocol) -> str:
    guidance = protocol.guidance_scale
    return ", ".join(
        filter(None, (protocol.class_labels, f"guidance {guidance:g}" if guidance not in (None, 1) else ""))
    )


def _metric(record: EvaluationRecord, name: str) -> str:
    if name not in record.metrics:
        return ""
    deviation = record.metrics.get(f"{name} std")
    return f"{record.metrics[name]:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
