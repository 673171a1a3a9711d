"""`dia-diffusion fid`: Frechet distances to reference images; also under `accelerate launch eval/fid.py`."""

import argparse
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.console import Counter, MeasuringProgress, console
from dia_diffusion.cli.feature_options import add_feature_options, load_features, tell_unreleased
from dia_diffusion.cli.fid_images import open_source, reference_of
from dia_diffusion.cli.fid_protocol import (
    add_protocol_option,
    check_features,
    check_pipelines,
    check_records,
    parse_with_protocol,
    reference_of_training,
)
from dia_diffusion.cli.fid_records import (
    check_record_file,
    keep,
    known_record,
    print_records,
    update_card,
)
from dia_diffusion.cli.sampling_options import SAMPLING, add_sampling_options, check_batch_size, load_for_sampling
from dia_diffusion.data import SPLITS
from dia_diffusion.data.sources import ACCEPTED
from dia_diffusion.distributed import all_agree, first_on_each_machine, on_main, start_accelerator
from dia_diffusion.errors import InputError, Stopped
from dia_diffusion.evaluation.evaluate import (
    FewImagesWarning,
    evaluate,
    few_images,
    work_folder,
)
from dia_diffusion.evaluation.feature_file import FINISHED
from dia_diffusion.evaluation.feature_pass import batches_of, widths_of
from dia_diffusion.evaluation.features import FeatureExtractor
from dia_diffusion.evaluation.metrics import KID_SUBSET_SIZE, METRICS, Extras
from dia_diffusion.evaluation.pipeline_distance import PipelineDistance, image_protocol, pipeline_origin
from dia_diffusion.evaluation.protocols import under_name
from dia_diffusion.evaluation.record import EvaluationRecord, Origin
from dia_diffusion.files import step_folders
from dia_diffusion.pipelines.folder import EVALUATIONS, find_pipeline, records_file
from dia_diffusion.training.run_folder import RunFolder

DEFAULT_COUNT = 1000  # images of a pipeline
PATIENCE = timedelta(days=1)  # one process computes the metrics, which can take an hour, while the others wait


def run(arguments: Sequence[str]) -> None:
    """Measures what the arguments say."""
    options = _parse(arguments)
    folders = _pipelines(options)
    if options.reference is None:
        options.reference = reference_of_training(folders[-1])
    if options.protocol is not None:
        check_pipelines(options.protocol, folders)
        check_records(options.protocol, [_records_file(options, folder) for folder in folders or (None,)])
    extras = _extras(options)
    accelerator = start_accelerator(patience=PATIENCE)
    extractor = first_on_each_machine(
        accelerator, lambda: load_features(options, options.reference, accelerator.device)
    )
    check_features(options, extractor.name)
    widths_of(extractor, extras.logits)  # raises for features without the logits that are asked for
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewImagesWarning)  # told below the table
        if folders:
            records = list(_of_pipelines(folders, options, extractor, accelerator))
        else:
            records = [_of_images(options, extractor, accelerator)]
    if accelerator.is_main_process:
        print_records(records, extras)
        tell_unreleased(options, extractor)
        for text in few_images(records[0].protocol, extractor.num_features):
            console.print(f"warning: {text}")
    accelerator.end_training()


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with what a protocol decides filled in; refuses what can't be measured before anything is read."""
    parser = CommandParser("fid", "Measures the Frechet distance of images to reference images.")
    parser.add_argument("source", metavar="SOURCE", help="a pipeline, a run, or images: a folder, a zip, digits, ...")
    parser.add_argument(
        "--reference",
        metavar="DATA",
        help=f"{ACCEPTED}; or a file of statistics; if none, with --protocol, what a run was trained on",
    )
    add_protocol_option(parser)
    parser.add_argument("--reference-split", choices=SPLITS, help="of the reference's images; train if none")
    parser.add_argument("--split", choices=SPLITS, help="of SOURCE, where it is images that have parts; train if none")
    parser.add_argument("--size", type=int, help="crop and resize images to this size; a pipeline's have their own")
    parser.add_argument("--channels", type=int, default=3, help="of images: 3, or 1 to measure them in grey")
    parser.add_argument("--num", type=int, help=f"images to measure; if none {DEFAULT_COUNT}, of a folder all")
    add_feature_options(parser)
    parser.add_argument("--metrics", default="fid", help=f"of {', '.join(METRICS)}; the distance is always there")
    parser.add_argument("--kid-subset-size", type=int, default=KID_SUBSET_SIZE, help="images a subset of KID")
    parser.add_argument("--bootstrap", type=int, default=0, help="resamples for the distance's 95 %% interval; 0: none")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="which of a run's pipelines; the newest if none")
    which.add_argument("--every-step", action="store_true", help="all of a run's pipelines, one after the other")
    add_sampling_options(parser)
    parser.add_argument(
        "--record", type=Path, help="the file to add records to; if none, evaluations.jsonl of the run, else here"
    )
    options = parser.parse_args(arguments)
    drawn = _is_drawn(Path(options.source))
    _refuse_ignored(options, parser, drawn)
    if options.reference is None and not (options.protocol is not None and drawn):
        raise InputError("--reference is missing; accepted without it: a run or its pipeline, with --protocol")
    if options.protocol is not None:
        options = parse_with_protocol(parser, arguments, drawn)
    if options.num is not None and options.num < 2:
        raise InputError(f"--num is {options.num}; accepted: 2 or more")
    check_batch_size(options)
    if options.record is not None:
        check_record_file(options.record)
    return options


def _pipelines(options: argparse.Namespace) -> list[Path]:
    """The folders of the pipelines to measure, in order of step; none where the source is images."""
    source = Path(options.source)
    if not _is_drawn(source):
        if options.every_step or options.step is not None:
            raise InputError(f"{source} is no run folder; --step and --every-step choose among a run's pipelines")
        return []
    if options.every_step and (folders := list(step_folders(RunFolder(source).pipelines).values())):
        return folders
    return [find_pipeline(source, options.step)]


def _records_file(options: argparse.Namespace, folder: Path | None) -> Path:
    """Where the records of a pipeline, or of images, are kept."""
    return options.record or (Path(EVALUATIONS) if folder is None else records_file(folder))


def _is_drawn(source: Path) -> bool:
    """Whether it is a pipeline or a run, and no images."""
    return (
        (source / "pipelines").is_dir() or (source / "model_index.json").is_file() or (source / "config.yaml").is_file()
    )


def _refuse_ignored(options: argparse.Namespace, parser: CommandParser, drawn: bool) -> None:
    """Raises InputError for an option that says nothing of this kind of source."""
    why = "draws images of its own" if drawn else "is no pipeline and no run"
    for name in ("size", "channels", "split") if drawn else SAMPLING:
        if (value := getattr(options, name)) != parser.get_default(name):
            raise InputError(f"--{name.replace('_', '-')} {value}: {options.source} {why}; leave it out")


def _of_pipelines(
    folders: list[Path], options: argparse.Namespace, extractor: FeatureExtractor, accelerator: Accelerator
) -> Iterator[EvaluationRecord]:
    """One record a pipeline; what is on record already is not measured again, at most put under a protocol's name."""
    extras, count = _extras(options), options.num or DEFAULT_COUNT
    extras.check_samples(count)
    pipeline, settings = load_for_sampling(folders[0], options, accelerator.device)
    channels, height, size = pipeline.image_shape
    if height != size:
        raise InputError(f"{folders[0]} draws images of {height}x{size}; accepted: square ones")
    reference, features = reference_of(options, extractor, accelerator, size, channels, extras)
    distance = PipelineDistance(
        extractor, reference, settings, count, options.batch_size, accelerator, extras, features
    )
    for index, folder in enumerate(folders):
        if index:
            pipeline, _ = load_for_sampling(folder, options, accelerator.device)
        file = _records_file(options, folder)
        protocol, origin = distance.protocol(pipeline, folder), pipeline_origin(folder)
        known = _seen_by_all(accelerator, known_record(file, protocol, origin, extras, options.protocol))
        record = known
        if record is None:
            work = work_folder(file, protocol, origin, extras)
            with Counter(f"measuring {folder.name}", "images") as counter, _going_on(work):
                progress = MeasuringProgress(counter, count, accelerator)
                record = distance.measure(pipeline, protocol, origin, progress, work, progress)
        record = under_name(record, options.protocol)
        if not all_agree(accelerator, record is known):
            on_main(accelerator, partial(keep, record, file, extras))
            on_main(accelerator, partial(update_card, folder, file))
        yield record


def _of_images(options: argparse.Namespace, extractor: FeatureExtractor, accelerator: Accelerator) -> EvaluationRecord:
    extras = _extras(options)
    images = open_source(options, accelerator)
    if len(images) < 2:
        raise InputError(f"{options.source} has {len(images)} image; a distance takes 2 or more")
    extras.check_samples(len(images))
    reference, features = reference_of(
        options, extractor, accelerator, images.images.shape[2], options.channels, extras
    )
    protocol = image_protocol(extractor, reference, len(images))
    origin = Origin(source=images.name, split=images.split, weights_hash=images.fingerprint)
    file = _records_file(options, None)
    known = _seen_by_all(accelerator, known_record(file, protocol, origin, extras, options.protocol))
    record = known
    if record is None:
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
        on_main(accelerator, partial(keep, record, file, extras))
        if accelerator.is_main_process:
            console.print(f"recorded in {file}")
    return record


def _seen_by_all(accelerator: Accelerator, record: EvaluationRecord | None) -> EvaluationRecord | None:
    """The record, unless a process doesn't see it yet: then all of them measure again."""
    return record if all_agree(accelerator, record is not None) else None


def _extras(options: argparse.Namespace) -> Extras:
    metrics = tuple(name.strip() for name in options.metrics.split(","))
    return Extras(metrics, options.kid_subset_size, options.bootstrap)


@contextmanager
def _going_on(work: Path) -> Iterator[None]:
    """Makes Ctrl-C say what is kept in the work folder."""
    try:
        yield
    except KeyboardInterrupt:
        text = "stopped before the first chunk of images was finished; nothing is kept"
        if (work / FINISHED).is_file():
            text = f"stopped; the same command goes on after the last finished chunk of images, kept in {work.parent}"
        raise Stopped(signal.SIGINT, text) from None
