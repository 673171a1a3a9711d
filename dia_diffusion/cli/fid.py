"""`dia-diffusion fid`: Frechet distances to reference images; also under `accelerate launch eval/fid.py`."""

import argparse
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.table import Table

from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.console import ConsoleReporter, Counter, SharedProgress, console
from dia_diffusion.cli.sampling_options import add_sampling_options, check_batch_size, load_for_sampling
from dia_diffusion.data import SPLITS, ImageSet, open_images
from dia_diffusion.data.sources import ACCEPTED, DOWNLOADS
from dia_diffusion.distributed import all_agree, first_on_each_machine, on_main, start_accelerator, together
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.evaluate import FewImagesWarning, evaluate, few_images
from dia_diffusion.evaluation.features import FEATURES, FeatureExtractor, build_features
from dia_diffusion.evaluation.pipeline_distance import PipelineDistance, image_protocol
from dia_diffusion.evaluation.record import EvaluationRecord, Origin, append_record, read_records
from dia_diffusion.evaluation.reference import Reference, reference_statistics
from dia_diffusion.files import step_folders
from dia_diffusion.pipelines.card import TRAINING_FILE, write_card
from dia_diffusion.sampling.load import find_pipeline, weights_hash
from dia_diffusion.sampling.seeds import my_share
from dia_diffusion.training.run_folder import RunFolder

BATCH = 256  # images of a folder measured at once


def run(arguments: Sequence[str]) -> None:
    """Measures what the arguments say."""
    parser = CommandParser("fid", "Measures the Frechet distance of images to reference images.")
    parser.add_argument("source", metavar="SOURCE", help="a pipeline, a run, or images: a folder, a zip, digits, ...")
    parser.add_argument("--reference", required=True, metavar="DATA", help=ACCEPTED)
    parser.add_argument("--reference-split", default="train", choices=SPLITS, help="the part of the reference")
    parser.add_argument("--split", default="train", choices=SPLITS, help="of SOURCE, where it is a dataset with parts")
    parser.add_argument("--num", type=int, help="images to measure; 1000 of a pipeline, all of a folder if none")
    parser.add_argument("--features", default="digits", help=f"one of {', '.join(FEATURES)}")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="which of a run's pipelines; the newest if none")
    which.add_argument("--every-step", action="store_true", help="all of a run's pipelines, one after the other")
    add_sampling_options(parser)
    parser.add_argument(
        "--record", type=Path, help="the file to add records to; if none, evaluations.jsonl of the run, else here"
    )
    options = parser.parse_args(arguments)
    if options.num is not None and options.num < 2:
        raise InputError(f"--num is {options.num}; accepted: 2 or more")
    check_batch_size(options)
    accelerator = start_accelerator()
    extractor = build_features(options.features, accelerator.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewImagesWarning)  # told below the table
        records = list(_records(options, extractor, accelerator))
    if accelerator.is_main_process:
        _print(records)
        for text in few_images(records[0].protocol, extractor.num_features):
            console.print(f"warning: {text}")
    accelerator.end_training()


def _records(
    options: argparse.Namespace, extractor: FeatureExtractor, accelerator: Accelerator
) -> Iterator[EvaluationRecord]:
    source = Path(options.source)
    if (source / "pipelines").is_dir() or (source / "model_index.json").is_file() or (source / "config.yaml").is_file():
        if options.every_step:
            folders = list(step_folders(RunFolder(source).pipelines).values()) or [find_pipeline(source)]
        else:
            folders = [find_pipeline(source, options.step)]
        yield from _of_pipelines(folders, options, extractor, accelerator)
        return
    if options.every_step or options.step is not None:
        raise InputError(f"{source} is no run folder; --step and --every-step choose among a run's pipelines")
    yield _of_images(options, extractor, accelerator)


def _of_pipelines(
    folders: list[Path], options: argparse.Namespace, extractor: FeatureExtractor, accelerator: Accelerator
) -> Iterator[EvaluationRecord]:
    """One record a pipeline; what is on record already is not measured again."""
    pipeline, settings = load_for_sampling(folders[0], options, accelerator.device)
    size, channels = pipeline.unet.config.sample_size, pipeline.unet.in_channels
    reference = _reference(options, extractor, accelerator, size, channels)
    distance = PipelineDistance(extractor, reference, settings, options.num or 1000, options.batch_size, accelerator)
    for index, folder in enumerate(folders):
        if index:
            pipeline, _ = load_for_sampling(folder, options, accelerator.device)
        file = options.record or records_file(folder)
        known = {} if not file.is_file() else {(r.protocol_hash(), r.weights_hash): r for r in read_records(file)}
        record = known.get((distance.protocol(pipeline, folder).hash(), weights_hash(folder)))
        # Should a process not see yet what the main one has written, all of them measure again.
        seen = all_agree(accelerator, record is not None)
        if record is None or not seen:
            with Counter(f"measuring {folder.name}", "images") as counter:
                record = distance.measure(pipeline, folder, SharedProgress(counter, distance.num_samples, accelerator))
            on_main(accelerator, partial(_keep, record, folder, file))
        yield record


def _of_images(options: argparse.Namespace, extractor: FeatureExtractor, accelerator: Accelerator) -> EvaluationRecord:
    images = _open(options.source, accelerator, split=options.split)
    if options.num is not None:
        if options.num > len(images):
            raise InputError(f"--num {options.num}: {options.source} has {len(images)} images")
        images = images.subset(range(options.num))
    height, width = images.images.shape[2:]
    if height != width:
        raise InputError(f"{options.source} has images of {height}x{width}; accepted: square ones")
    reference = _reference(options, extractor, accelerator, height, 3)
    mine = list(my_share(range(len(images)), accelerator.process_index, accelerator.num_processes))
    origin = Origin(source=images.name, weights_hash=images.fingerprint)
    with Counter(f"measuring {images.name}", "images") as counter:
        progress = SharedProgress(counter, len(images), accelerator)
        batches = _batches(images, mine, progress)
        protocol = image_protocol(extractor, reference, len(images))
        record = evaluate(batches, extractor, reference.statistics, protocol, origin)
    file = options.record or Path("evaluations.jsonl")
    on_main(accelerator, lambda: append_record(file, record))
    if accelerator.is_main_process:
        console.print(f"recorded in {file}")
    return record


def _reference(
    options: argparse.Namespace, extractor: FeatureExtractor, accelerator: Accelerator, size: int, channels: int
) -> Reference:
    """The reference's statistics, its images reduced to the size that is measured."""
    images = _open(options.reference, accelerator, size=size, channels=channels, split=options.reference_split)
    return first_on_each_machine(accelerator, lambda: reference_statistics(images, extractor))


def _open(source: str, accelerator: Accelerator, **kwargs: Any) -> ImageSet:
    reporter = ConsoleReporter()
    for unit, argument in (("images", "progress"), ("bytes", "download_progress")):
        kwargs[argument] = partial(reporter.reading, unit) if accelerator.is_main_process else None
    in_turn = first_on_each_machine if source in DOWNLOADS else together
    return in_turn(accelerator, lambda: open_images(source, **kwargs))


def _batches(images: ImageSet, indices: list[int], progress: SharedProgress) -> Iterator[torch.Tensor]:
    for start in range(0, len(indices), BATCH):
        batch = images.images[indices[start : start + BATCH]]
        yield torch.from_numpy(batch)
        progress(len(batch))


def records_file(folder: Path) -> Path:
    """Where a pipeline's records lie: in its run, or in the folder itself where it is in none."""
    run = RunFolder(folder.resolve().parents[1])
    inside = folder.resolve().parent == run.pipelines and run.config.is_file()
    return run.evaluations if inside else folder / "evaluations.jsonl"


def _keep(record: EvaluationRecord, folder: Path, file: Path) -> None:
    """Appends the record, and puts the pipeline's records so far into its model card."""
    append_record(file, record)
    if file != records_file(folder) or not (folder / TRAINING_FILE).is_file():
        return
    own = weights_hash(folder)
    rows = [
        {
            "metric": record.metric,
            "distance": record.distance,
            "num_samples": record.protocol.num_samples,
            "reference": f"{record.protocol.reference} ({record.protocol.reference_split})",
            "sampler": record.protocol.sampler,
            "steps": record.protocol.num_inference_steps,
        }
        for record in read_records(file)
        if record.weights_hash == own
    ]
    write_card(folder, rows)


def _print(records: list[EvaluationRecord]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("source", "step", "metric", "distance", "images", "reference", "sampler", "seconds", "protocol"):
        table.add_column(name, justify="right" if name in ("step", "distance", "images", "seconds") else "left")
    for record in records:
        protocol = record.protocol
        sampler = "" if protocol.sampler is None else f"{protocol.sampler}, {protocol.num_inference_steps} steps"
        reference = f"{protocol.reference} {protocol.reference_split}, {protocol.reference_count:,}"
        table.add_row(
            record.source,
            "" if record.step is None else f"{record.step:,}",
            record.metric,
            f"{record.distance:.3f}",
            f"{protocol.num_samples:,}",
            reference,
            sampler,
            f"{record.seconds:.1f}",
            record.protocol_hash()[:8],
        )
    console.print(table)
