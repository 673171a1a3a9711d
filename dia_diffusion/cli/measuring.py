"""What `dia-diffusion fid` does once its options are read: it measures pipelines, or images, and records that."""

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from dia_diffusion.cli.console import Counter, MeasuringProgress, console
from dia_diffusion.cli.feature_options import load_features, tell_unreleased
from dia_diffusion.cli.fid_images import open_source, reference_of
from dia_diffusion.cli.fid_protocol import check_features
from dia_diffusion.cli.fid_records import check_record_file, print_records, records_file_of
from dia_diffusion.cli.sampling_options import load_for_sampling
from dia_diffusion.distributed import all_agree, first_on_each_machine, on_rank_zero, start_accelerator
from dia_diffusion.errors import InputError, Stopped, number_of
from dia_diffusion.evaluation.evaluate import FewImagesWarning, evaluate, few_images, work_folder
from dia_diffusion.evaluation.extras import Extras
from dia_diffusion.evaluation.feature_file import FINISHED
from dia_diffusion.evaluation.feature_pass import batches_of, widths_of
from dia_diffusion.evaluation.features import FeatureExtractor
from dia_diffusion.evaluation.pipeline_distance import (
    PipelineDistance,
    image_protocol,
    keep_record,
    known_record,
    pipeline_origin,
    update_card,
)
from dia_diffusion.evaluation.protocols import under_name
from dia_diffusion.evaluation.record import EvaluationRecord, Origin


def measure(folders: list[Path], options: argparse.Namespace, extras: Extras, count: int) -> None:
    """Measures pipelines by so many images of each or, where there are none, the images that the options name."""
    accelerator = start_accelerator()
    extractor = first_on_each_machine(
        accelerator, lambda: load_features(options, options.reference, accelerator.device)
    )
    check_features(options, extractor.name)
    widths_of(extractor, extras.logits)  # raises for features without the logits that are asked for
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewImagesWarning)  # told below the table
        if folders:
            records = list(_of_pipelines(folders, options, extras, count, extractor, accelerator))
        else:
            records = [_of_images(options, extras, extractor, accelerator)]
    if accelerator.is_main_process:
        print_records(records, extras)
        tell_unreleased(options, extractor)
        for text in few_images(records[0].protocol, extractor.num_features):
            console.print(f"warning: {text}")
    accelerator.end_training()


def _of_pipelines(
    folders: list[Path],
    options: argparse.Namespace,
    extras: Extras,
    count: int,
    extractor: FeatureExtractor,
    accelerator: Accelerator,
) -> Iterator[EvaluationRecord]:
    """One record a pipeline; what is on record already is not measured again, at most put under a protocol's name."""
    extras.check_samples(count)
    pipeline, _ = load_for_sampling(folders[0], options, accelerator.device)
    channels, height, size = pipeline.image_shape
    if height != size:
        raise InputError(f"{folders[0]} draws images of {height}x{size}; accepted: square ones")
    reference, features = reference_of(options, extractor, accelerator, size, channels, extras)
    distance = PipelineDistance(extractor, reference, count, options.batch_size, accelerator, extras, features)
    for index, folder in enumerate(folders):
        if index:
            pipeline, _ = load_for_sampling(folder, options, accelerator.device)
        file = records_file_of(options, folder)
        protocol, origin = distance.protocol(pipeline, folder), pipeline_origin(folder)
        known = _seen_by_all(accelerator, known_record(file, protocol, origin, extras, options.protocol))
        record = known
        if record is None:
            on_rank_zero(accelerator, partial(check_record_file, file))
            work = work_folder(file, protocol, origin, extras)
            with Counter(f"measuring {folder.name}", "images") as counter, _going_on(work):
                progress = MeasuringProgress(counter, count, accelerator)
                record = distance.measure(pipeline, protocol, origin, progress, work, progress)
        record = under_name(record, options.protocol)
        if not all_agree(accelerator, record is known):
            on_rank_zero(accelerator, partial(keep_record, record, file, extras))
            on_rank_zero(accelerator, partial(update_card, folder, file))
        yield record


def _of_images(
    options: argparse.Namespace, extras: Extras, extractor: FeatureExtractor, accelerator: Accelerator
) -> EvaluationRecord:
    images = open_source(options, accelerator)
    if len(images) < 2:
        raise InputError(f"{options.source} has {len(images)} image; a distance takes 2 or more")
    extras.check_samples(len(images))
    reference, features = reference_of(options, extractor, accelerator, images.shape[1], options.channels, extras)
    protocol = image_protocol(extractor, reference, len(images))
    origin = Origin(source=images.name, split=images.split, weights_hash=images.fingerprint)
    file = records_file_of(options, None)
    known = _seen_by_all(accelerator, known_record(file, protocol, origin, extras, options.protocol))
    record = known
    if record is None:
        on_rank_zero(accelerator, partial(check_record_file, file))
        work = work_folder(file, protocol, origin, extras)
        with Counter(f"measuring {images.name}", "images") as counter, _going_on(work):
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
    record = under_name(record, options.protocol)
    if not all_agree(accelerator, record is known):
        on_rank_zero(accelerator, partial(keep_record, record, file, extras))
        if accelerator.is_main_process:
            console.print(f"recorded in {file}")
    return record


def _seen_by_all(accelerator: Accelerator, record: EvaluationRecord | None) -> EvaluationRecord | None:
    """The record, unless a process doesn't see it yet: then all of them measure again."""
    return record if all_agree(accelerator, record is not None) else None


@contextmanager
def _going_on(work: Path) -> Iterator[None]:
    """Makes a signal say what is kept in the work folder."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        text = "stopped before the first chunk of images was finished; nothing is kept"
        if (work / FINISHED).is_file():
            text = f"stopped; the same command goes on after the last finished chunk of images, kept in {work.parent}"
        raise Stopped(number_of(interrupt), text) from None
