"""Where `fid` finds and keeps its records, and how it shows them."""

import argparse
import os
from pathlib import Path

from rich.table import Table

from dia_diffusion.cli.console import console
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.extras import Extras
from dia_diffusion.evaluation.record import EvaluationRecord
from dia_diffusion.pipelines.folder import EVALUATIONS, records_file


def check_record_file(file: Path) -> None:
    """Raises InputError for what no record could be added to, before anything is measured."""
    place = next(path for path in (file, *file.absolute().parents) if path.exists())
    if file.is_dir() or not (place == file or place.is_dir()) or not os.access(place, os.W_OK):
        raise InputError(f"{file} can't be written; accepted as --record: a file in a folder that can be written")


def records_file_of(options: argparse.Namespace, folder: Path | None) -> Path:
    """Where the records of a pipeline, or of images, are kept."""
    return options.record or (Path(EVALUATIONS) if folder is None else records_file(folder))


def print_records(records: list[EvaluationRecord], extras: Extras) -> None:
    """A table of distances, and one of the other metrics that were asked for; each record has them."""
    table = Table(box=None, pad_edge=False)
    for name in ("source", "step", "metric", "distance", "images", "reference", "sampler", "seconds", "protocol"):
        table.add_column(name, justify="right" if name in ("step", "distance", "images", "seconds") else "left")
    for record in records:
        protocol = record.protocol
        sampler = "" if protocol.sampler is None else f"{protocol.sampler}, {protocol.num_inference_steps} steps"
        count = None if protocol.reference_count is None else f"{protocol.reference_count:,}"
        reference = ", ".join(filter(None, (protocol.reference, protocol.reference_split, count)))
        interval = "" if record.low is None else f" [{record.low:.3f}, {record.high:.3f}]"
        table.add_row(
            *_place(record),
            record.metric,
            f"{record.distance:.3f}{interval}",
            f"{protocol.num_samples:,}",
            reference,
            sampler,
            f"{record.seconds:.1f}",
            " ".join(filter(None, (record.protocol_name, record.protocol_hash()[:8]))),
        )
    console.print(table)
    if names := extras.names(records[0].protocol.features):
        console.print(_metrics_table(records, names))


def _metrics_table(records: list[EvaluationRecord], names: list[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("source", "step", *names):
        table.add_column(name, justify="left" if name == "source" else "right")
    for record in records:
        values = []
        for name in names:
            deviation = record.metrics.get(f"{name} std")
            values.append(f"{record.metrics[name]:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}"))
        table.add_row(*_place(record), *values)
    return table


def _place(record: EvaluationRecord) -> tuple[str, str]:
    source = record.source if record.split is None else f"{record.source}, {record.split}"
    return source, "" if record.step is None else f"{record.step:,}"
