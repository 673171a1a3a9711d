"""`dia-diffusion fid`: Frechet distances to reference images; also under `accelerate launch eval/fid.py`.

The route: options -> protocol -> features -> reference -> images -> distances -> records.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dia_diffusion.cli.console import ConsoleProgress, console
from dia_diffusion.cli.fid_images import load_reference, pipelines_of, reference_images, sources_of, training_images
from dia_diffusion.cli.fid_options import (
    MeasureOptions,
    Options,
    check_features,
    per_features,
    refuse_ignored,
    resolve_protocol,
    with_precision,
)
from dia_diffusion.cli.shared_options import load_features, load_for_sampling, warn_unreleased
from dia_diffusion.errors import InputError, Stopped, number_of
from dia_diffusion.progress import Progress
from dia_diffusion.tables import Table

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dia_diffusion.data import ImageSet
    from dia_diffusion.evaluation.evaluate import Evaluator
    from dia_diffusion.evaluation.features import FeatureExtractor
    from dia_diffusion.evaluation.protocol import EvalProtocol
    from dia_diffusion.evaluation.record import EvaluationRecord
    from dia_diffusion.evaluation.sources import MeasuredImages


def run(options: Options) -> None:
    """Measures what the options ask for, and records and prints it."""
    from dia_diffusion.data.sources import find_format

    folder = Path(options.source)
    is_model = any((folder / name).exists() for name in ("pipelines", "model_index.json", "config.yaml"))
    if not folder.exists() and find_format(options.source) is None:
        raise InputError(f"`SOURCE` must be a pipeline, a run or images, got {options.source}, which doesn't exist")
    refuse_ignored(options, is_model)
    options = with_precision(options)
    if options.sweep:
        from dia_diffusion.cli.fid_sweep import run_sweep

        run_sweep(options)
    else:
        measure(options, pipelines_of(options) if is_model else [])


def measure(options: MeasureOptions, pipelines: list[Path]) -> "list[list[EvaluationRecord]]":
    """Measures, records and prints pipelines, or the source's images if there are none, with each feature extractor.

    Returns a list of records per extractor.
    """
    records = measure_points(options, pipelines, [{}], print_records)
    if os.environ.get("RANK", "0") == "0" and len(records) > 1 and "fdr" in options.metrics:
        print_mean_fdr(list(zip(*records, strict=True)))
    return records


def measure_points(
    options: MeasureOptions,
    pipelines: list[Path],
    settings: Sequence[Mapping[str, Any]],
    show: "Callable[[list[EvaluationRecord], EvalProtocol], None]",
) -> "list[list[EvaluationRecord]]":
    """Measures and records each pipeline, or the source's images, with each item of `settings` and each extractor.

    Args:
        settings: fields of EvalProtocol that replace those of the options or the named protocol.
        show: prints the records of one extractor.
    """
    from dia_diffusion.distributed import start_accelerator

    plans = [_plan(one, pipelines, settings) for one in per_features(options)]  # raises before anything is measured
    accelerator = start_accelerator()
    if len(settings) > 1:
        for pipeline, protocol in product(pipelines, plans[0].protocols):
            load_for_sampling(pipeline, protocol, accelerator.device)  # raises for settings that don't fit the pipeline
    records = _measure(plans, pipelines, accelerator, show)
    accelerator.end_training()
    return records


@dataclass(frozen=True)
class _Plan:
    """The measurements with one feature extractor."""

    options: MeasureOptions
    reference_data: str
    protocols: "list[EvalProtocol]"
    """One for each item of `settings`."""
    files: dict[Path | None, Path]
    """The records file of each pipeline, or of the images (None)."""


def _plan(options: MeasureOptions, pipelines: list[Path], settings: Sequence[Mapping[str, Any]]) -> _Plan:
    reference_data = options.reference or training_images(options, pipelines)
    protocols = [resolve_protocol(options, bool(pipelines), reference_data, each) for each in settings]
    folders: list[Path | None] = [*pipelines] or [None]
    files = {pipeline: _records_file(options, pipeline) for pipeline in folders}
    for protocol in protocols:
        _check_records(options, protocol, files)
    return _Plan(options, reference_data, protocols, files)


def _measure(
    plans: list[_Plan],
    pipelines: list[Path],
    accelerator: "Accelerator",
    show: "Callable[[list[EvaluationRecord], EvalProtocol], None]",
) -> "list[list[EvaluationRecord]]":
    """The records of each extractor; images are generated once for all extractors."""
    from dia_diffusion.evaluation.evaluate import few_images_warnings, record_together

    extractors = [_load_features(plan, accelerator) for plan in plans]
    records: list[list[EvaluationRecord]] = [[] for _ in plans]
    with ConsoleProgress() as shown:
        progress = shown if accelerator.is_main_process else Progress()
        evaluators: list[Evaluator] = []
        real: ImageSet | None = None
        for source, shape, index in sources_of(plans[0].options, plans[0].protocols, pipelines, accelerator, progress):
            evaluators = evaluators or [
                _evaluator(plan, source.count, shape, extractor, accelerator, progress)
                for plan, extractor in zip(plans, extractors, strict=True)
            ]
            current = [replace(each, protocol=p.protocols[index]) for each, p in zip(evaluators, plans, strict=True)]
            file = plans[0].files[source.folder]
            if plans[0].options.show and real is None:
                data = plans[0].reference_data
                real = reference_images(plans[0].options, plans[0].protocols[0], data, shape, accelerator, progress)
            pages = [] if real is None else _show(plans[0], current, source, real, progress)
            measured = record_together(current, source, file, partial(_measuring, progress))
            for own, (record, _) in zip(records, measured, strict=True):
                own.append(record)
            if any(added for _, added in measured) and source.folder is None and accelerator.is_main_process:
                console.print(f"recorded in {file}")
            if pages and accelerator.is_main_process:
                console.print("samples: " + ", ".join(map(str, pages)))
    if accelerator.is_main_process:
        for plan, extractor, own in zip(plans, extractors, records, strict=True):
            show(own, plan.protocols[0])
            warn_unreleased(plan.options, extractor)
            for text in few_images_warnings(own[0].protocol, extractor.num_features):
                console.print(f"warning: {text}")
    return records


def _load_features(plan: _Plan, accelerator: "Accelerator") -> "FeatureExtractor":
    from dia_diffusion.distributed import first_on_each_machine

    protocol = plan.protocols[0]
    options = plan.options.model_copy(update={"features": protocol.features})
    extractor = first_on_each_machine(
        accelerator, lambda: load_features(options, plan.reference_data, accelerator.device)
    )
    check_features(plan.options, protocol, extractor.name)
    protocol.check_layers(extractor)
    return extractor


def _show(
    plan: _Plan,
    evaluators: "Sequence[Evaluator]",
    source: "MeasuredImages",
    real: "ImageSet",
    progress: Progress,
) -> list[Path]:
    """Writes pages of the samples beside real images; the features stay in the work folders for the measurement."""
    from dia_diffusion.cli.fid_show import show_samples

    file = plan.files[source.folder]
    works = [evaluator.work_folder(source, evaluator.resolve(source), file) for evaluator in evaluators]
    with _measuring(progress, works[0]):
        return show_samples(evaluators, source, works, plan.options.show, real, progress, file.parent)


def _evaluator(
    plan: _Plan,
    count: int,
    shape: tuple[int, int, int],
    extractor: "FeatureExtractor",
    accelerator: "Accelerator",
    progress: Progress,
) -> "Evaluator":
    """The evaluator of a plan for `count` images of this shape, with the reference loaded."""
    from dia_diffusion.evaluation.evaluate import Evaluator
    from dia_diffusion.evaluation.reference import measure_held_out

    protocol, data = plan.protocols[0], plan.reference_data
    protocol.check_count(count, num_features=extractor.num_features)
    reference = load_reference(plan.options, protocol, data, shape, extractor, accelerator, progress)
    held_out = measure_held_out(reference, data, shape, extractor, protocol, accelerator, progress)
    return Evaluator(protocol, extractor, reference, accelerator, held_out)


# Records.


def _records_file(options: MeasureOptions, pipeline: Path | None) -> Path:
    """Where the records of a pipeline, or of images, are kept."""
    from dia_diffusion.pipelines.folder import EVALUATIONS, records_file

    return options.record or (Path(EVALUATIONS) if pipeline is None else records_file(pipeline))


def _check_records(options: MeasureOptions, protocol: "EvalProtocol", files: "dict[Path | None, Path]") -> None:
    """Raises InputError for pipelines of other weights, unusable record files, and records of a changed protocol."""
    from dia_diffusion.evaluation.record import read_records
    from dia_diffusion.io import check_writable
    from dia_diffusion.pipelines.folder import read_training

    if options.record is not None:
        check_writable(options.record, "`--record`")
    for pipeline in filter(None, files) if protocol.name else ():
        weights = (read_training(pipeline) or {}).get("weights", protocol.weights)  # other programs don't say
        if weights != protocol.weights:
            measured = f"protocol {protocol.name} measures {protocol.weights}"
            raise InputError(f"{pipeline} holds {weights} weights; {measured}")
    for file in dict.fromkeys(files.values()) if protocol.name else ():
        if file.is_file():
            protocol.refuse_changed(read_records(file), file)


@contextmanager
def _measuring(progress: Progress, work: Path) -> Iterator[Progress]:
    """A context around the measurement, in which the message for a signal says what the work folder keeps."""
    from dia_diffusion.evaluation.feature_store import CHUNK_FILES

    try:
        yield progress
    except KeyboardInterrupt as interrupt:
        text = "stopped before the first chunk of images was finished; nothing is kept"
        if any(work.glob(CHUNK_FILES)):
            text = "stopped; the same command resumes after the last finished chunk of images, kept in "
            text += str(work.parent)
        raise Stopped(number_of(interrupt), text) from None


# Tables.


def print_records(records: "list[EvaluationRecord]", asked: "EvalProtocol") -> None:
    """Prints a table of distances, and one of the other requested metrics, which each record has."""
    from dia_diffusion.evaluation.record import describe_number

    columns = ("source", "step", "metric", "distance", "images", "reference", "sampler", "seconds", "protocol")
    rows = []
    for record in records:
        protocol = record.protocol
        sampler = "" if protocol.sampler is None else f"{protocol.sampler}, {protocol.num_inference_steps} steps"
        count = None if protocol.reference_count is None else f"{protocol.reference_count:,}"
        reference = ", ".join(filter(None, (protocol.reference, protocol.reference_split, count)))
        interval = "" if record.low is None else f" [{record.low:.3f}, {record.high:.3f}]"
        cells = [
            *_source_and_step(record),
            record.metric,
            f"{record.distance:.3f}{interval}",
            f"{protocol.num_samples:,}",
        ]
        named = " ".join(filter(None, (record.protocol_name, record.protocol_hash()[:8])))
        rows.append([*cells, reference, sampler, f"{record.seconds:.1f}", named])
    console.print(Table(columns, rows, left=("source", "metric", "reference", "sampler", "protocol")).to_rich())
    if names := asked.metric_labels(records[0].protocol.features):
        rows = [[*_source_and_step(record), *(describe_number(record, name) for name in names)] for record in records]
        console.print(Table(("source", "step", *names), rows, left=("source",)).to_rich())


def print_mean_fdr(records: "Sequence[Sequence[EvaluationRecord]]") -> None:
    """Prints FDr averaged over extractors, as in arXiv 2604.28190; `records`: per source, one record per extractor.

    The ends of the intervals are averaged too: right if the ratios of all extractors err together, else too wide.
    """
    rows = []
    for group in records:
        names = [f"FDr({record.protocol.features})" for record in group]
        parts = ("", " low", " high")
        mean, low, high = (
            sum(record.metrics[name + part] for record, name in zip(group, names, strict=True)) / len(group)
            for part in parts
        )
        rows.append([*_source_and_step(group[0]), ", ".join(names), f"{mean:.4f} [{low:.4f}, {high:.4f}]"])
    columns = ("source", "step", "mean of", f"FDr^{len(records[0])}")
    console.print(Table(columns, rows, left=("source", "mean of")).to_rich())


def _source_and_step(record: "EvaluationRecord") -> tuple[str, str]:
    source = record.source if record.split is None else f"{record.source}, {record.split}"
    return source, "" if record.step is None else f"{record.step:,}"
