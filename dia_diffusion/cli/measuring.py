"""What `dia-diffusion fid` does once its options are checked: measure pipelines, or images, and record the results."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.table import Table

from dia_diffusion.cli.console import ConsoleProgress, Counter, MeasuringProgress, console
from dia_diffusion.cli.fid import DEFAULT_COUNT, Request, check_record_file
from dia_diffusion.cli.shared_options import load_features, load_for_sampling, warn_unreleased
from dia_diffusion.data import ImageSet
from dia_diffusion.data.sources import open_images_on_ranks
from dia_diffusion.distributed import all_agree, first_on_each_machine, on_all_ranks, on_rank_zero, start_accelerator
from dia_diffusion.errors import InputError, Stopped, number_of
from dia_diffusion.evaluation.evaluate import (
    FewImagesWarning,
    PipelineDistance,
    evaluate,
    few_images,
    image_protocol,
    keep_record,
    known_record,
    pipeline_origin,
    update_card,
    work_folder,
)
from dia_diffusion.evaluation.feature_store import FINISHED, batches_of, widths_of
from dia_diffusion.evaluation.features import FeatureExtractor
from dia_diffusion.evaluation.metrics import Extras
from dia_diffusion.evaluation.protocol import under_name
from dia_diffusion.evaluation.record import EvaluationRecord, Origin
from dia_diffusion.evaluation.reference import (
    Reference,
    choose,
    is_statistics_file,
    open_reference,
    reference_features,
    reference_statistics,
)


def measure(request: Request) -> None:
    """Measures the request's pipelines or, where there are none, its images; prints the records."""
    options = request.options
    accelerator = start_accelerator()
    extractor = first_on_each_machine(
        accelerator, lambda: load_features(options, request.reference, accelerator.device)
    )
    check_features(request, extractor.name)
    widths_of(extractor, request.extras.logits)  # raises for features without the logits that are asked for
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewImagesWarning)  # printed below the table
        if request.pipelines:
            records = list(_of_pipelines(request, extractor, accelerator))
        else:
            records = [_of_images(request, extractor, accelerator)]
    if accelerator.is_main_process:
        print_records(records, request.extras)
        warn_unreleased(options, extractor)
        for text in few_images(records[0].protocol, extractor.num_features):
            console.print(f"warning: {text}")
    accelerator.end_training()


def check_features(request: Request, features: str) -> None:
    """Raises InputError for Inception's features of other weights than a protocol that measures in them means."""
    if request.protocol is not None and features != request.protocol.features:
        raise InputError(
            f"--inception-weights {request.options.inception_weights} give features {features}; protocol "
            f"{request.protocol.name} measures in {request.protocol.features}"
        )


def _of_pipelines(
    request: Request, extractor: FeatureExtractor, accelerator: Accelerator
) -> Iterator[EvaluationRecord]:
    """One record per pipeline; what is on record already is not measured again, at most put under a protocol's name."""
    options, extras, count = request.options, request.extras, request.options.num or DEFAULT_COUNT
    extras.check_samples(count)
    first = request.pipelines[0]
    pipeline, _ = load_for_sampling(first, options, accelerator.device)
    channels, height, size = pipeline.image_shape
    if height != size:
        raise InputError(f"{first} must draw square images, got {height}x{size}")
    reference, features = _reference(request, extractor, accelerator, size, channels)
    distance = PipelineDistance(extractor, reference, count, options.batch_size, accelerator, extras, features)
    for index, folder in enumerate(request.pipelines):
        if index:
            pipeline, _ = load_for_sampling(folder, options, accelerator.device)
        file = request.records_file(folder)
        protocol, origin = distance.protocol(pipeline, folder), pipeline_origin(folder)
        known = _seen_by_all(accelerator, known_record(file, protocol, origin, extras, request.protocol))
        record = known
        if record is None:
            on_rank_zero(accelerator, partial(check_record_file, file))
            work = work_folder(file, protocol, origin, extras)
            with Counter(f"measuring {folder.name}", "images") as counter, _explain_interrupt(work):
                progress = MeasuringProgress(counter, count, accelerator)
                record = distance.measure(pipeline, protocol, origin, progress, work, progress)
        record = under_name(record, request.protocol)
        if not all_agree(accelerator, record is known):
            on_rank_zero(accelerator, partial(keep_record, record, file, extras))
            on_rank_zero(accelerator, partial(update_card, folder, file))
        yield record


def _of_images(request: Request, extractor: FeatureExtractor, accelerator: Accelerator) -> EvaluationRecord:
    options, extras = request.options, request.extras
    images = _open_source(request, accelerator)
    if len(images) < 2:
        raise InputError(f"{options.source} must have 2 images or more, got {len(images)}")
    extras.check_samples(len(images))
    reference, features = _reference(request, extractor, accelerator, images.shape[1], options.channels)
    protocol = image_protocol(extractor, reference, len(images))
    origin = Origin(source=images.name, split=images.split, weights_hash=images.fingerprint)
    file = request.records_file(None)
    known = _seen_by_all(accelerator, known_record(file, protocol, origin, extras, request.protocol))
    record = known
    if record is None:
        on_rank_zero(accelerator, partial(check_record_file, file))
        work = work_folder(file, protocol, origin, extras)
        with Counter(f"measuring {images.name}", "images") as counter, _explain_interrupt(work):
            progress = MeasuringProgress(counter, len(images), accelerator)
            record = evaluate(
                batches_of(images, progress),
                extractor,
                reference.statistics,
                protocol,
                origin,
                accelerator,
                extras=extras,
                reference_features=features,
                work=work,
                reporter=progress,
            )
    record = under_name(record, request.protocol)
    if not all_agree(accelerator, record is known):
        on_rank_zero(accelerator, partial(keep_record, record, file, extras))
        if accelerator.is_main_process:
            console.print(f"recorded in {file}")
    return record


def _seen_by_all(accelerator: Accelerator, record: EvaluationRecord | None) -> EvaluationRecord | None:
    """The record, unless a process doesn't see it yet: then all of them measure again."""
    return record if all_agree(accelerator, record is not None) else None


@contextmanager
def _explain_interrupt(work: Path) -> Iterator[None]:
    """Makes the message of a signal say what is kept in the work folder."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        text = "stopped before the first chunk of images was finished; nothing is kept"
        if (work / FINISHED).is_file():
            text = f"stopped; the same command resumes after the last finished chunk of images, kept in {work.parent}"
        raise Stopped(number_of(interrupt), text) from None


# Images: those to measure, and the reference's.


def _open_source(request: Request, accelerator: Accelerator) -> ImageSet:
    """The images to measure, square ones; fewer than all are a choice by seed 0, since files are sorted by class."""
    options = request.options
    images = _open(options.source, options.split, accelerator, size=options.size, channels=options.channels)
    if options.num is not None:
        if options.num > len(images):
            raise InputError(f"{request.spell('num')}: {options.source} has {len(images)} images")
        images = images.subset(choose(len(images), options.num, seed=0))
    height, width = images.shape[1:]
    if height != width:
        raise InputError(f"{options.source} must have square images, got {height}x{width}")
    return images


def _reference(
    request: Request, extractor: FeatureExtractor, accelerator: Accelerator, size: int, channels: int
) -> tuple[Reference, torch.Tensor | None]:
    """The reference: from a file of statistics, or of its images reduced to the size that is measured.

    With it, on the main process and where the extras need them, the features (M, D) of its images.
    """
    source, split, extras = request.reference, request.options.reference_split, request.extras
    if is_statistics_file(source):
        if extras.reference_features:
            raise InputError(f"`--reference` must be images for kid and prc, got {source}, which holds statistics")
        reference = on_all_ranks(accelerator, lambda: open_reference(source, extractor, (channels, size, size)))
        # Images without parts are opened as "train"; a file of another program doesn't say what it was made of.
        known = reference.split or ("train" if reference.shape else None)
        if split not in (None, known):
            raise InputError(f"{request.spell('reference_split')}: {source} is of {known or 'no part that it names'}")
        _check_count(request, reference.statistics.count)
        return reference, None
    images = _open(source, split, accelerator, size=size, channels=channels)
    _check_count(request, len(images))
    features = None
    if extras.reference_features:
        extras.check_reference(len(images))
        with Counter("measuring the reference", "images") as counter:
            progress = MeasuringProgress(counter, len(images), accelerator)
            features = reference_features(images, extractor, accelerator, progress, progress)
    statistics = partial(reference_statistics, images, extractor, features=features)
    return first_on_each_machine(accelerator, statistics), features


def _check_count(request: Request, count: int | None) -> None:
    """Raises InputError unless the reference has as many images as the protocol says, where it says."""
    protocol = request.protocol
    if protocol is not None and protocol.reference_count not in (None, count):
        has = "doesn't say how many images it has" if count is None else f"has {count:,} images"
        expected = f"protocol {protocol.name} measures against {protocol.reference_count:,}"
        raise InputError(f"--reference {request.reference} {has}; {expected}")


def _open(source: str, split: str | None, accelerator: Accelerator, **kwargs: Any) -> ImageSet:
    return open_images_on_ranks(source, accelerator, ConsoleProgress(), split=split or "train", **kwargs)


# Records.


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
