"""`dia-diffusion fid`: Frechet distances to reference images; also under `accelerate launch eval/fid.py`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.feature_options import add_feature_options
from dia_diffusion.cli.fid_protocol import (
    add_protocol_option,
    check_pipelines,
    check_records,
    parse_with_protocol,
    reference_of_training,
)
from dia_diffusion.cli.fid_records import check_record_file, records_file_of
from dia_diffusion.cli.imports import imports
from dia_diffusion.cli.sampling_options import SAMPLING, add_sampling_options, check_batch_size
from dia_diffusion.data import SPLITS
from dia_diffusion.data.sources import accepted_sources
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.extras import KID_SUBSET_SIZE, METRICS, Extras
from dia_diffusion.io import step_folders
from dia_diffusion.pipelines.folder import find_pipeline
from dia_diffusion.training.run_folder import RunFolder

DEFAULT_COUNT = 1000  # images of a pipeline


def run(arguments: Sequence[str]) -> None:
    """Measures what the arguments say."""
    options = _parse(arguments)
    folders = _pipelines(options)
    if options.reference is None:
        options.reference = reference_of_training(folders[-1])
    if options.protocol is not None:
        check_pipelines(options.protocol, folders)
        check_records(options.protocol, [records_file_of(options, folder) for folder in folders or (None,)])
    extras = _extras(options)
    with imports():
        from dia_diffusion.cli.measuring import measure
    measure(folders, options, extras, options.num or DEFAULT_COUNT)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with what a protocol decides filled in; refuses what can't be measured before anything is read."""
    parser = CommandParser("fid", "Measures the Frechet distance of images to reference images.")
    parser.add_argument("source", metavar="SOURCE", help="a pipeline, a run, or images: a folder, a zip, digits, ...")
    parser.add_argument(
        "--reference",
        metavar="DATA",
        help=f"{accepted_sources()}; or a file of statistics; if none, with --protocol, what a run was trained on",
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


def _extras(options: argparse.Namespace) -> Extras:
    metrics = tuple(name.strip() for name in options.metrics.split(","))
    return Extras(metrics, options.kid_subset_size, options.bootstrap)
