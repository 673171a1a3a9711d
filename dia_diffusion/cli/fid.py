"""`dia-diffusion fid`: Frechet distances to reference images; also under `accelerate launch eval/fid.py`.

The route: options -> protocol -> features -> reference -> images -> distances -> records.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from dia_diffusion.cli.console import ConsoleProgress, console
from dia_diffusion.cli.options import Metavar, Positional, flag, refuse_both, spell
from dia_diffusion.cli.shared_options import (
    FeatureOptions,
    SamplingOptions,
    Split,
    chosen_precision,
    features_for,
    load_features,
    load_for_sampling,
    warn_unreleased,
)
from dia_diffusion.errors import InputError, Stopped, number_of
from dia_diffusion.io import shipped_names
from dia_diffusion.progress import Progress
from dia_diffusion.tables import Table
from dia_diffusion.validation import describe_error

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dia_diffusion.data import ImageSet
    from dia_diffusion.evaluation.evaluate import Evaluator
    from dia_diffusion.evaluation.features import FeatureExtractor
    from dia_diffusion.evaluation.protocol import EvalProtocol
    from dia_diffusion.evaluation.record import EvaluationRecord
    from dia_diffusion.evaluation.reference import Reference
    from dia_diffusion.evaluation.sources import ImageSource

DEFAULT_COUNT = 1000
"""Images of a pipeline."""


class MeasureOptions(SamplingOptions, FeatureOptions):
    """What `measure` uses, whatever the command."""

    reference: Annotated[str | None, Metavar("DATA")] = None
    """Images (a folder, a zip, a .npy or .npz file, a CIFAR archive, hf:NAME, digits, cifar10, cifar100), or a file of
    statistics; if not given, with --protocol, what a run was trained on."""
    protocol: Annotated[str | None, Metavar("NAME")] = Field(
        None,
        description=f"A YAML file, or one of {', '.join(shipped_names('protocols'))}: decides features, number of "
        "images, part of the reference, and how a pipeline is sampled; of images that are there already, the first "
        "three.",
    )
    reference_split: Split | None = None
    """Of the reference's images; train if not given."""
    num: int | None = Field(None, ge=2)
    """Images to measure; if not given, 1000 of a pipeline, all of a folder."""
    metrics: list[str] = Field(["fid"])
    """Of fid, sfid, kid, isc, prc, dc, mind, fd-inf, fdr, isc-adm, prc-adm; the distance is always measured."""
    kid_subset_size: int = 1000
    """Images per subset of KID."""
    held_out: Annotated[str | None, Metavar("DATA")] = None
    """Real images outside the reference, for fdr; if not given, the reference's other split."""
    bootstrap: int = 0
    """Resamples for the distance's 95 % interval; 0 for none."""
    show: int = Field(0, ge=0)
    """Samples to show on a page beside the records, with their nearest reference images, the best and the worst."""
    record: Path | None = None
    """The file to add records to; if not given, evaluations.jsonl of the run, else here."""


class Options(MeasureOptions):
    """Measures the Frechet distance of images to reference images."""

    source: Annotated[str, Positional("SOURCE")]
    """A pipeline, a run, or images: a folder, a zip, digits, ..."""
    split: Split | None = None
    """Of SOURCE, where it is images that have parts; train if not given."""
    size: int | None = None
    """Crop and resize images to this size; a pipeline's have their own."""
    channels: Literal[1, 3] = 3
    """Of images: 3, or 1 to measure them in gray."""
    step: int | None = None
    """Which of a run's pipelines; the newest if not given."""
    every_step: bool = False
    """All of a run's pipelines, one after the other."""
    sweep: Annotated[tuple[str, ...], Metavar("KEY=VALUE,VALUE")] = ()
    """Measures the grid of these values, such as guidance_scale=1,1.5,2 steps=10,25. Of sampler, steps, guidance_scale,
    guidance_interval (none,0.3:5), guide, precision, step, width and decay; the last two are averages as of ema."""

    @model_validator(mode="after")
    def _check(self) -> "Options":
        refuse_both(self, "step", "every_step")
        refuse_both(self, "sweep", "every_step")
        refuse_both(self, "sweep", "show")
        return self


def run(options: Options) -> None:
    """Measures what the options ask for, and records and prints it."""
    folder = Path(options.source)
    is_model = any((folder / name).exists() for name in ("pipelines", "model_index.json", "config.yaml"))
    _refuse_ignored(options, is_model)
    if options.sweep:
        from dia_diffusion.cli.fid_sweep import run_sweep

        run_sweep(options)
    else:
        measure(options, _pipelines(options) if is_model else [])


def measure(options: MeasureOptions, pipelines: list[Path]) -> "list[list[EvaluationRecord]]":
    """Measures pipelines, or the source's images if there are none, in each of the features; records and prints it.

    Returns the records in each of the features.
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
    """Measures and records each pipeline, or the source's images, with each of the settings, in each of the features.

    Args:
        settings: fields of EvalProtocol, in place of the options' or the named protocol's.
        show: prints the records in one of the features.
    """
    from dia_diffusion.distributed import start_accelerator

    plans = [_plan(one, pipelines, settings) for one in per_features(options)]  # refuses before anything is measured
    accelerator = start_accelerator()
    if len(settings) > 1:
        for pipeline, protocol in product(pipelines, plans[0].protocols):
            load_for_sampling(pipeline, protocol, accelerator.device)  # refuses settings that aren't the pipeline's
    records = _measure(plans, pipelines, accelerator, show)
    accelerator.end_training()
    return records


def per_features(options: MeasureOptions) -> list[MeasureOptions]:
    """The options with one name as `features`, for each of the names."""
    names = (options.features or "").split(",")
    if len(names) > 1 and options.weights_file is not None:
        raise InputError(f"`--weights` must be given with features of one name, got --features {options.features}")
    return [options.model_copy(update={"features": name}) if name else options for name in names]


@dataclass(frozen=True)
class _Plan:
    """What is measured in one of the features."""

    options: MeasureOptions
    reference_data: str
    protocols: "list[EvalProtocol]"
    """One for each of the settings."""
    files: dict[Path | None, Path]
    """For the records of each pipeline, or of the images."""


def _plan(options: MeasureOptions, pipelines: list[Path], settings: Sequence[Mapping[str, Any]]) -> _Plan:
    reference_data = options.reference or _training_images(options, pipelines)
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
    """The records in each of the features; the images are made once for all features."""
    from dia_diffusion.evaluation.evaluate import few_images, record_together

    extractors = [_load_features(plan, accelerator) for plan in plans]
    records: list[list[EvaluationRecord]] = [[] for _ in plans]
    with ConsoleProgress() as shown:
        progress = shown if accelerator.is_main_process else Progress()
        evaluators: list[Evaluator] = []
        for source, shape, index in _sources(plans[0], pipelines, accelerator, progress):
            evaluators = evaluators or [
                _evaluator(plan, shape, extractor, accelerator, progress)
                for plan, extractor in zip(plans, extractors, strict=True)
            ]
            judges = [replace(each, protocol=p.protocols[index]) for each, p in zip(evaluators, plans, strict=True)]
            file = plans[0].files[source.folder]
            measured = record_together(judges, source, file, _measuring(progress))
            for own, (record, _) in zip(records, measured, strict=True):
                own.append(record)
            if any(added for _, added in measured) and source.folder is None and accelerator.is_main_process:
                console.print(f"recorded in {file}")
            for plan, extractor in zip(plans, extractors, strict=True) if plans[0].options.show else ():
                page = _show(plan, source, shape, extractor, accelerator, progress)
                if accelerator.is_main_process:
                    console.print(f"samples: {page}")
    if accelerator.is_main_process:
        for plan, extractor, own in zip(plans, extractors, records, strict=True):
            show(own, plan.protocols[0])
            warn_unreleased(plan.options, extractor)
            for text in few_images(own[0].protocol, extractor.num_features):
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
    source: "ImageSource",
    shape: tuple[int, int, int],
    extractor: "FeatureExtractor",
    accelerator: "Accelerator",
    progress: Progress,
) -> Path:
    from dia_diffusion.cli.fid_show import show_samples

    images = _reference_images(plan.options, plan.protocols[0], plan.reference_data, shape, accelerator, progress)
    folder = plan.files[source.folder].parent
    return show_samples(source, plan.options.show, images, extractor, accelerator, progress, folder)


def _evaluator(
    plan: _Plan,
    shape: tuple[int, int, int],
    extractor: "FeatureExtractor",
    accelerator: "Accelerator",
    progress: Progress,
) -> "Evaluator":
    """With the reference loaded, for images of this shape."""
    from dia_diffusion.evaluation.evaluate import Evaluator
    from dia_diffusion.evaluation.reference import measure_held_out

    protocol, data = plan.protocols[0], plan.reference_data
    reference = _reference(plan.options, protocol, data, shape, extractor, accelerator, progress)
    held_out = measure_held_out(reference, data, shape, extractor, protocol, accelerator, progress)
    return Evaluator(protocol, extractor, reference, accelerator, held_out)


# The protocol.

OPTION_OF = {"num_samples": "num"}
"""Field of EvalProtocol -> the option, where they are called differently."""
DECIDED = (
    *("features", "num_samples", "sampler", "steps", "precision", "classes"),
    *("guidance_scale", "guidance_interval", "guide", "reference_split"),
)
"""What a named protocol decides."""
EXTRA = ("metrics", "kid_subset_size", "bootstrap", "held_out")


def resolve_protocol(
    options: MeasureOptions, is_model: bool, reference: str, settings: Mapping[str, Any] | None = None
) -> "EvalProtocol":
    """The protocol that the options name, or that they are. Raises InputError for what can't be asked for.

    settings: take the place of the protocol's; if they differ, its name says which they are.
    """
    from dia_diffusion.evaluation.protocol import EvalProtocol

    values: dict[str, Any] = {}
    settings = dict(settings or {})
    if options.protocol is not None:
        named = EvalProtocol.read(options.protocol)
        _refuse_decided(options, named, is_model)
        extra = {name: getattr(options, name) for name in EXTRA if name in options.model_fields_set}
        values = named.model_dump() | extra
        if changed := [name for name, value in settings.items() if value != values[name]]:
            values["name"] += " with " + ", ".join(f"{name}={settings[name]}" for name in changed)
    else:
        values = {field: getattr(options, OPTION_OF.get(field, field)) for field in (*DECIDED, *EXTRA)}
        values["features"] = options.features or features_for(reference)
        values["num_samples"] = options.num or (DEFAULT_COUNT if is_model else 0)
        values["precision"] = chosen_precision(options.precision)
    try:
        return EvalProtocol.model_validate(values | settings)
    except ValidationError as error:
        raise InputError(describe_error(error, EvalProtocol, _flag)) from None


def _flag(field: Sequence[str]) -> str:
    return flag([OPTION_OF.get(field[0], field[0])])


def _refuse_ignored(options: Options, is_model: bool) -> None:
    """Raises InputError for an option that has no effect on this kind of source."""
    why = "draws images of its own" if is_model else "is no pipeline and no run"
    ignored = (
        ("size", "channels", "split") if is_model else (*SamplingOptions.model_fields, "step", "every_step", "sweep")
    )
    for name in ignored:
        if getattr(options, name) != Options.model_fields[name].default:
            raise InputError(f"{spell(options, name)}: {options.source} {why}; leave it out")
    if options.reference is None and not (options.protocol is not None and is_model):
        raise InputError("`--reference` is missing; only a run or its pipeline with --protocol needs none")


def _refuse_decided(options: MeasureOptions, protocol: "EvalProtocol", is_model: bool) -> None:
    """Raises InputError for an option that a named protocol decides."""
    for field in DECIDED:
        option, value = OPTION_OF.get(field, field), getattr(protocol, field)
        applies = is_model or option not in SamplingOptions.model_fields
        is_open = field == "reference_split" and value is None
        if option in options.model_fields_set and applies and not is_open:
            says = ",".join(map(str, value)) if isinstance(value, list) else value
            if value is None:
                says = "all" if field == "classes" else "none"
            raise InputError(
                f"{spell(options, option)}: protocol {protocol.name} says {says}; leave it out, or leave out --protocol"
            )


def check_features(options: FeatureOptions, protocol: "EvalProtocol", features: str) -> None:
    """Raises InputError for Inception's features of other weights than a named protocol means."""
    if protocol.name and features != protocol.features:
        raise InputError(
            f"`--weights` must give features {protocol.features} for protocol {protocol.name}, got "
            f"{options.weights_file}, which give {features}"
        )


def _spelled(protocol: "EvalProtocol", field: str) -> str:
    """A field of the protocol in a message."""
    named = f"`{field}` of protocol {protocol.name}"
    return named if protocol.name else f"`{_flag([field])}`"


# Records.


def _records_file(options: MeasureOptions, pipeline: Path | None = None) -> Path:
    """Where the records of a pipeline, or of images, are kept."""
    from dia_diffusion.pipelines.folder import EVALUATIONS, records_file

    return options.record or (Path(EVALUATIONS) if pipeline is None else records_file(pipeline))


def _check_records(options: MeasureOptions, protocol: "EvalProtocol", files: "dict[Path | None, Path]") -> None:
    """Raises InputError for pipelines of other weights, files that can't be used, and records of a changed protocol."""
    from dia_diffusion.evaluation.record import check_record_file, read_records
    from dia_diffusion.pipelines.folder import read_training

    if options.record is not None:
        check_record_file(options.record)
    for pipeline in filter(None, files) if protocol.name else ():
        weights = (read_training(pipeline) or {}).get("weights", protocol.weights)  # others' don't say which they are
        if weights != protocol.weights:
            measured = f"protocol {protocol.name} measures {protocol.weights}"
            raise InputError(f"{pipeline} holds {weights} weights; {measured}")
    for file in dict.fromkeys(files.values()) if protocol.name else ():
        if file.is_file():
            protocol.refuse_changed(read_records(file), file)


# Sources and the reference.


def _pipelines(options: Options) -> list[Path]:
    """The folders of the pipelines to measure, in order of step."""
    from dia_diffusion.io import step_folders
    from dia_diffusion.pipelines.folder import find_pipeline
    from dia_diffusion.training.run_folder import RunFolder

    if options.every_step and (folders := step_folders(RunFolder(options.source).pipelines)):
        return list(folders.values())
    return [find_pipeline(options.source, options.step)]


def _training_images(options: MeasureOptions, pipelines: list[Path]) -> str:
    """The images that a pipeline's run was trained on, as its recipe names them."""
    from dia_diffusion.data.sources import find_format
    from dia_diffusion.pipelines.folder import read_training

    pipeline = pipelines[-1]
    training = read_training(pipeline)
    if training is None:
        raise InputError(f"{pipeline} doesn't say what it was trained on; give --reference DATA")
    source = str(training["recipe"]["data"].get("source"))
    if find_format(source) is None and not Path(source).exists():
        raise InputError(f"{pipeline} was trained on {source}, which isn't here; give --reference DATA")
    return source


def _sources(
    plan: _Plan, pipelines: list[Path], accelerator: "Accelerator", progress: Progress
) -> "Iterator[tuple[ImageSource, tuple[int, int, int], int]]":
    """What is measured, each with the shape (C, H, W) of its images, which are square, and its protocol's index."""
    from dia_diffusion.evaluation.sources import images_source, pipeline_source

    options = plan.options
    if not pipelines:
        assert isinstance(options, Options)
        images = _open_source(options, plan.protocols[0], accelerator, progress)
        yield images_source(images), _square(options.source, (options.channels, *images.shape[1:])), 0
        return
    plan.protocols[0].check_count(plan.protocols[0].num_samples)
    for folder, (index, protocol) in product(pipelines, enumerate(plan.protocols)):
        pipeline, _ = load_for_sampling(folder, protocol, accelerator.device)
        shape = _square(folder, pipeline.image_shape)
        yield pipeline_source(pipeline, folder, protocol.num_samples, options.batch_size), shape, index


def _square(source: str | Path, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    if shape[1] != shape[2]:
        raise InputError(f"{source} must have square images, got {shape[1]}x{shape[2]}")
    return shape


def _open_source(
    options: Options, protocol: "EvalProtocol", accelerator: "Accelerator", progress: Progress
) -> "ImageSet":
    """The images to measure; fewer than all are a choice by seed 0, since files are sorted by class."""
    from dia_diffusion.data.sources import open_images_on_ranks
    from dia_diffusion.evaluation.reference import choose

    opening = {"split": options.split or "train", "size": options.size, "channels": options.channels}
    images = open_images_on_ranks(options.source, accelerator, progress, **opening)
    if (count := protocol.num_samples) > len(images):
        what = _spelled(protocol, "num_samples")
        raise InputError(f"{what} must be {len(images)} or less, the images of {options.source}, got {count}")
    images = images.subset(choose(len(images), count, seed=0)) if count not in (0, len(images)) else images
    if len(images) < 2:
        raise InputError(f"{options.source} must have 2 images or more, got {len(images)}")
    protocol.check_count(len(images))
    return images


def _reference(
    options: MeasureOptions,
    protocol: "EvalProtocol",
    data: str,
    shape: tuple[int, int, int],
    extractor: "FeatureExtractor",
    accelerator: "Accelerator",
    progress: Progress,
) -> "Reference":
    """The reference: a file of statistics, or images reduced to the shape that is measured."""
    from dia_diffusion.distributed import on_all_ranks
    from dia_diffusion.evaluation import reference as references

    split = protocol.reference_split or options.reference_split
    if not references.is_statistics_file(data):
        images = _reference_images(options, protocol, data, shape, accelerator, progress)
        return references.measure_reference(images, extractor, protocol, accelerator, progress)
    needing = protocol.needing("reference features")
    if (names := needing + ["--show"] * bool(options.show)) and not references.holds_images(data):
        raise InputError(f"`--reference` must be images for {' and '.join(names)}, got {data}, which holds statistics")
    reference = on_all_ranks(accelerator, lambda: references.open_reference(data, extractor, shape))
    if protocol.needs("spatial"):
        width, got = extractor.widths["spatial"], 0 if reference.spatial is None else reference.spatial.mean.size
        if got != width:
            needed = f"images or have mu_s and sigma_s of {width} features for sfid"
            raise InputError(f"`--reference` must be {needed}, got {data}, which has {got or 'none'}")
    # Images without parts are opened as "train"; a file of another program doesn't say what it was made of.
    known = reference.split or ("train" if reference.shape else None)
    if split not in (None, known):
        what = _spelled(protocol, "reference_split") if protocol.reference_split else "`--reference-split`"
        raise InputError(f"{what} must be that of {data}, {known or 'no part that it names'}, got {split}")
    references.check_reference_count(protocol, data, reference.statistics.count)
    if not needing:
        return reference
    return references.with_images(reference, data, shape, extractor, protocol, accelerator, progress)


def _reference_images(
    options: MeasureOptions,
    protocol: "EvalProtocol",
    data: str,
    shape: tuple[int, int, int],
    accelerator: "Accelerator",
    progress: Progress,
) -> "ImageSet":
    from dia_diffusion.data.sources import open_images_on_ranks

    split = protocol.reference_split or options.reference_split or "train"
    return open_images_on_ranks(data, accelerator, progress, split=split, size=shape[1], channels=shape[0])


def _measuring(progress: Progress) -> Any:
    """A context around the measuring, in which the message of a signal says what is kept in the work folder."""

    @contextmanager
    def measuring(work: Path) -> Iterator[Progress]:
        from dia_diffusion.evaluation.feature_store import CHUNK_FILES

        try:
            yield progress
        except KeyboardInterrupt as interrupt:
            text = "stopped before the first chunk of images was finished; nothing is kept"
            if any(work.glob(CHUNK_FILES)):
                text = "stopped; the same command resumes after the last finished chunk of images, kept in "
                text += str(work.parent)
            raise Stopped(number_of(interrupt), text) from None

    return measuring


# Tables.


def print_records(records: "list[EvaluationRecord]", asked: "EvalProtocol") -> None:
    """A table of distances, and one of the other metrics that were asked for; each record has them."""
    from dia_diffusion.evaluation.record import describe_number

    columns = ("source", "step", "metric", "distance", "images", "reference", "sampler", "seconds", "protocol")
    rows = []
    for record in records:
        protocol = record.protocol
        sampler = "" if protocol.sampler is None else f"{protocol.sampler}, {protocol.num_inference_steps} steps"
        count = None if protocol.reference_count is None else f"{protocol.reference_count:,}"
        reference = ", ".join(filter(None, (protocol.reference, protocol.reference_split, count)))
        interval = "" if record.low is None else f" [{record.low:.3f}, {record.high:.3f}]"
        cells = [*_place(record), record.metric, f"{record.distance:.3f}{interval}", f"{protocol.num_samples:,}"]
        named = " ".join(filter(None, (record.protocol_name, record.protocol_hash()[:8])))
        rows.append([*cells, reference, sampler, f"{record.seconds:.1f}", named])
    console.print(Table(columns, rows, left=("source", "metric", "reference", "sampler", "protocol")).to_rich())
    if names := asked.metric_labels(records[0].protocol.features):
        rows = [[*_place(record), *(describe_number(record, name) for name in names)] for record in records]
        console.print(Table(("source", "step", *names), rows, left=("source",)).to_rich())


def print_mean_fdr(records: "Sequence[Sequence[EvaluationRecord]]") -> None:
    """FDr averaged over features, as in arXiv 2604.28190; one sequence of records per source, one record per features.

    The ends of the intervals are averaged too: right if the ratios of all features err together, else too wide.
    """
    rows = []
    for group in records:
        names = [f"FDr({record.protocol.features})" for record in group]
        parts = ("", " low", " high")
        mean, low, high = (
            sum(record.metrics[name + part] for record, name in zip(group, names, strict=True)) / len(group)
            for part in parts
        )
        rows.append([*_place(group[0]), ", ".join(names), f"{mean:.4f} [{low:.4f}, {high:.4f}]"])
    columns = ("source", "step", "mean of", f"FDr^{len(records[0])}")
    console.print(Table(columns, rows, left=("source", "mean of")).to_rich())


def _place(record: "EvaluationRecord") -> tuple[str, str]:
    source = record.source if record.split is None else f"{record.source}, {record.split}"
    return source, "" if record.step is None else f"{record.step:,}"
