"""What is on record of a study's runs, what is missing, and what cannot be resumed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.distributed import check_trackers, micro_batch_size
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.curves import refuse_mixed_protocols
from dia_diffusion.evaluation.features import build_features
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import EvaluationRecord, read_records
from dia_diffusion.evaluation.reference import hash_of_images, is_statistics_file, read_statistics
from dia_diffusion.io import sha256_of_file, step_folders
from dia_diffusion.pipelines.folder import read_training
from dia_diffusion.precision import Precision, in_precision, training_device, training_precision
from dia_diffusion.sweeps.sweep import Study, StudyRun
from dia_diffusion.training.checkpoint import newest_state
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.diffusion import check_samples
from dia_diffusion.training.recipe import AUTO
from dia_diffusion.training.run_folder import (
    RunFolder,
    check_new_run,
    read_metrics,
    refuse_changes,
    refuse_other_randomness,
)


@dataclass(frozen=True)
class Point:
    """One distance of one run."""

    unit: str
    """The study's name for it, be it a variant's."""
    batch_size: int
    seed: int
    step: int
    images_seen: int
    distance: float
    low: float | None
    """The ends of the interval over images, where one was asked for; seeds are no part of it."""
    high: float | None
    run: str
    """The run's folder within the study's."""


@dataclass(frozen=True)
class Measured:
    """A run's record that counts."""

    run: StudyRun
    record: EvaluationRecord

    @property
    def is_last(self) -> bool:
        """Whether it is of the end of the run's training."""
        return self.record.step == self.run.experiment.train.max_steps

    @property
    def point(self) -> Point:
        run, record = self.run, self.record
        step = record.step or 0
        images = step * run.batch_size
        return Point(
            run.unit, run.batch_size, run.seed, step, images, record.distance, record.low, record.high, run.name
        )


def collect(study: Study) -> list[Point]:
    """The points of the curves: one a run and step that is on record under the study's protocol, in the runs' order.

    Raises:
        InputError: as `measured`.
    """
    return [one.point for one in measured(study, study.config.protocol)]


def measured(study: Study, protocol: str) -> list[Measured]:
    """The records under this protocol's name, in order of run and step; of two of one step the later counts.

    Raises:
        InputError: a record that is truncated, of another run, or made when the protocol had other settings; or records
            that differ in what the protocol leaves open, such as the reference.
    """
    named = EvalProtocol.read(protocol)
    found: dict[str, list[EvaluationRecord]] = {}
    for run in study.runs:
        file = RunFolder(run.folder).evaluations
        records = read_records(file) if file.is_file() else []
        named.refuse_changed(records, file)
        by_step = {record.step: record for record in records if record.step and named.named_in(record)}
        for record in by_step.values():
            _refuse_another_run(record, run)
        found[run.name] = [by_step[step] for step in sorted(by_step)]
    refuse_mixed_protocols(list(found.items()))
    return [Measured(run, record) for run in study.runs for record in found[run.name]]


def _refuse_another_run(record: EvaluationRecord, run: StudyRun) -> None:
    theirs = (record.batch_size, record.seed, record.unit)
    own = (run.batch_size, run.seed, run.experiment.model.attention)
    if theirs != own:
        raise InputError(
            f"{RunFolder(run.folder).evaluations} has a record of batch size {theirs[0]}, seed {theirs[1]} and unit "
            f"{theirs[2]}; the study's run has {own[0]}, {own[1]} and {own[2]}"
        )


@dataclass(frozen=True)
class Cost:
    """Of one whole training."""

    seconds: float
    """Of the logged steps: grids, checkpoints and pauses left out."""
    peak_memory_mib: int | None
    """The GPU's on a GPU, else the process's; None for a run that didn't log it."""


def training_cost(run: StudyRun) -> Cost | None:
    """The cost of a run's training; None while it isn't finished."""
    file = RunFolder(run.folder).metrics
    lines, train = read_metrics(file) if file.is_file() else [], run.experiment.train
    last_logged = train.max_steps // train.log_every * train.log_every
    if not lines or lines[-1]["step"] < last_logged:
        return None
    memory = [line["peak_memory_mib"] for line in lines if line.get("peak_memory_mib") is not None]
    return Cost(training_seconds(lines), max(memory, default=None))


def training_seconds(lines: Sequence[dict[str, Any]]) -> float:
    """What logged steps took, images over rate: a line's rate is that of the images since the one before."""
    seconds, before = 0.0, 0
    for line in lines:
        if rate := line.get("images_per_second"):  # a line of a distance or a test has none
            seconds += (line["images"] - before) / rate
            before = line["images"]
    return seconds


@dataclass(frozen=True)
class RunState:
    """How far a run has come."""

    run: StudyRun
    step: int
    """It would go on from here; the last one where it is trained."""
    trained: bool
    """Whether the pipelines of all its points are there, of those that are not on record already."""
    unmeasured: list[int]
    """Steps of its curve without a record."""
    final_unmeasured: bool
    """Whether the final protocol, where there is one, has no record of its last step."""

    @property
    def steps_left(self) -> int:
        return self.run.experiment.train.max_steps - self.step

    @property
    def complete(self) -> bool:
        return self.trained and not self.unmeasured and not self.final_unmeasured


def check_study(study: Study) -> None:
    """Tells what the study would be refused for hours later: by its runs' recipes, or by what is there of them.

    Raises:
        InputError: a unit that can't be built, a batch size that can't run, no such protocol, a run of another recipe
            or with other images than the others, or records that can't be gone on with.
    """
    checked = []
    for run in study.runs:
        experiment = run.experiment
        shape = (experiment.model, experiment.noise, experiment.samples, run.batch_size)
        if shape not in checked:
            checked.append(shape)
            with _named(run.unit):
                check_samples(experiment)
                micro_batch_size(run.batch_size, 1, experiment.train.accumulation)
                check_trackers(experiment.trackers)
                for name in filter(None, (study.config.protocol, study.config.final_protocol)):
                    _check_classes(EvalProtocol.read(name), experiment)
    _check_records(study)
    states = inventory(study)
    fingerprints = [(state.run, origin["data"]["fingerprint"]) for state in states if (origin := _check_run(state))]
    for run, fingerprint in fingerprints[1:]:
        first, expected = fingerprints[0]
        if fingerprint != expected:
            raise InputError(f"{run.folder} was trained on other images than {first.folder}; remove one of them")


def check_randomness(study: Study) -> None:
    """Raises InputError where runs are still to be trained and one was trained with another version's randomness.

    All runs are compared by their seeds, so none is trained beside it either; measuring and drawing remain.
    """
    if all(state.trained for state in inventory(study)):
        return
    for run in study.runs:
        origin = _origin(run) or _origin_on_record(run)
        if origin is not None:
            refuse_other_randomness(origin, run.folder)


def check_images(study: Study, progress: Callable[[int, int], None] | None = None) -> None:
    """Opens the images that runs are to be trained on and measured against, before any is; none where all are.

    Raises:
        InputError: they can't be used, or aren't those of the runs and records that are there.
        RunError: of a download.
    """
    states = inventory(study)

    @cache  # what runs are trained on is mostly what they are measured against
    def opened(source: str, size: int, channels: int, split: str) -> ImageSet:
        return open_images(source, size=size, channels=channels, split=split, progress=progress)

    missing = next((state.run for state in states if not state.trained), None)
    if missing is not None:
        data, model = missing.experiment.data, missing.experiment.model
        _refuse_other_images(study, opened(data.source, model.sample_size, model.in_channels, data.split), data.source)
    check_measuring(study, [state.run for state in states if not state.complete], opened)


def _check_classes(protocol: EvalProtocol, experiment: Experiment) -> None:
    known = experiment.model.num_classes or 0
    if protocol.classes is not None and max(protocol.classes) >= known:
        raise InputError(f"protocol {protocol.name} has class {max(protocol.classes)}; the model has {known} classes")
    if protocol.guidance_scale != 1 and not experiment.data.label_dropout:
        raise InputError(f"protocol {protocol.name} has guidance, which needs data.label_dropout; the recipe has none")


def _refuse_other_images(study: Study, images: ImageSet, source: str) -> None:
    for run in study.runs:
        origin = _origin(run)
        if origin and origin["data"]["fingerprint"] != images.fingerprint:
            raise InputError(f"{run.folder} was trained on other images than data.source {source} has")


def in_one_precision(study: Study) -> tuple[Study, Precision | None]:
    """The study with the recipes' precision auto resolved, once for all runs, and what it was resolved to.

    It is what the study's runs began in where there are some, else the best of this machine. None: no recipe says auto.
    """
    auto = [run for run in study.runs if run.experiment.train.mixed_precision == AUTO]
    if not auto:
        return study, None
    origins = filter(None, map(_origin, auto))
    began_in = next((origin["recipe"]["train"]["mixed_precision"] for origin in origins), None)
    precision = training_precision("auto", training_device(), began_in)

    def resolved(run: StudyRun) -> StudyRun:
        return replace(run, experiment=in_precision(run.experiment, precision)) if run in auto else run

    return replace(study, runs=[resolved(run) for run in study.runs]), precision


def inventory(study: Study) -> list[RunState]:
    """The state of each run, in their order.

    Raises:
        InputError: records that can't be used, see `points.measured`.
    """
    curve = _steps_on_record(study, study.config.protocol)
    final_protocol = study.config.final_protocol
    final = {} if final_protocol is None else _steps_on_record(study, final_protocol)
    states = []
    for run in study.runs:
        folder, last = RunFolder(run.folder), run.experiment.train.max_steps
        unmeasured = [step for step in run.steps if step not in curve.get(run.name, ())]
        final_unmeasured = final_protocol is not None and last not in final.get(run.name, ())
        trained = _to_measure(run, unmeasured, final_unmeasured) <= step_folders(folder.pipelines).keys()
        step = last if trained else max(step_folders(folder.checkpoints), default=0)
        states.append(RunState(run, step, trained, unmeasured, final_unmeasured))
    return states


def _to_measure(run: StudyRun, unmeasured: list[int], final_unmeasured: bool) -> set[int]:
    """The steps whose pipelines are still needed."""
    return {*unmeasured, run.steps[-1]} if final_unmeasured else set(unmeasured)


def _check_run(state: RunState) -> dict[str, Any] | None:
    """What is known of where a run comes from; None for a new one."""
    run = state.run
    folder, last = RunFolder(run.folder), run.experiment.train.max_steps
    origin, pipelines = _origin(run), step_folders(folder.pipelines)
    if origin is None:
        return None
    refuse_changes(origin["recipe"], run.experiment, run.folder)
    if origin["step"] > last:
        raise InputError(f"{run.folder} is trained for {origin['step']:,} steps; the study's runs end after {last:,}")
    if not folder.newest_checkpoint() and not state.trained:
        check_new_run(folder, run.experiment)
        return origin
    for step in sorted(_to_measure(run, state.unmeasured, state.final_unmeasured)):
        if step <= origin["step"] and step not in pipelines:
            raise InputError(
                f"{run.folder} has passed step {step:,} without leaving a pipeline there, which the study's curve "
                "needs; go on with the points it was started with, or choose another output"
            )
    return origin


def _origin(run: StudyRun) -> dict[str, Any] | None:
    """What the newest checkpoint of a run that can be read says of itself, else its newest pipeline."""
    folder = RunFolder(run.folder)
    state = newest_state(folder.checkpoints)
    if state is not None:
        return state
    pipelines = step_folders(folder.pipelines)
    return read_training(pipelines[max(pipelines)]) if pipelines else None


def _origin_on_record(run: StudyRun) -> dict[str, Any] | None:
    """The randomness of a measured run without checkpoints and pipelines."""
    file = RunFolder(run.folder).evaluations
    records = read_records(file) if file.is_file() else []
    return {"randomness": records[-1].randomness or 1} if records else None


def _check_records(study: Study) -> None:
    names = [study.config.protocol, study.config.final_protocol]
    protocols = [EvalProtocol.read(name) for name in names if name is not None]
    if len({p.name for p in protocols}) < len({p.hash() for p in protocols}):
        raise InputError(f"protocol and final_protocol are both called {protocols[0].name} and differ; rename one")
    for run in study.runs:
        file = RunFolder(run.folder).evaluations
        records = read_records(file) if file.is_file() else []
        for protocol in protocols:
            protocol.refuse_changed(records, file)


def _steps_on_record(study: Study, protocol: str) -> dict[str, set[int]]:
    """Name of a run -> its steps that are on record."""
    found: dict[str, set[int]] = {}
    for one in measured(study, protocol):
        found.setdefault(one.run.name, set()).add(one.point.step)
    return found


@contextmanager
def _named(unit: str) -> Iterator[None]:
    """Says which unit can't be built."""
    try:
        yield
    except InputError as error:
        raise InputError(f"unit {unit}: {error}") from None


OpenImages = Callable[[str, int, int, str], ImageSet]
"""Images of a source, size, channels and split."""


def check_measuring(study: Study, unmeasured: Sequence[StudyRun], open_images: OpenImages) -> None:
    """Opens features and reference of the runs still to be measured; nothing where there are none.

    A reference that the study names is opened in any case: records may be of another.

    Raises:
        InputError: they can't be used, or aren't those that are on record under a protocol's name.
        RunError: of a download.
    """
    of = study.runs[:1] if study.config.reference else unmeasured
    sources = {_source(study, run): run for run in of}
    for name in filter(None, (study.config.protocol, study.config.final_protocol)):
        protocol, known = EvalProtocol.read(name), next((one.record for one in measured(study, name)), None)
        if unmeasured:
            features_hash = build_features(protocol.features).weights_hash
            _refuse_others(known, protocol, f"features {protocol.features}", {"features_hash": features_hash})
        founds = {source: _reference(source, run, protocol, open_images) for source, run in sources.items()}
        for source, found in founds.items():
            if protocol.reference_count not in (None, found["reference_count"]):
                told = f"has {found['reference_count']} images; protocol {protocol.name} measures against"
                raise InputError(f"reference {source} {told} {protocol.reference_count:,}")
            _refuse_others(known, protocol, f"reference {source}", found)
            if found != next(iter(founds.values())):
                told = " and ".join(f"{run.name} against {source}" for source, run in sources.items())
                raise InputError(f"would measure {told}, which differ; --reference DATA gives one for all")


def _source(study: Study, run: StudyRun) -> str:
    """What `fid` will measure a run against: a trained one says itself what it was trained on."""
    if study.config.reference is not None:
        return study.config.reference
    newest = step_folders(RunFolder(run.folder).pipelines).get(run.experiment.train.max_steps)
    training = None if newest is None else read_training(newest)
    return str(run.experiment.data.source if training is None else training["recipe"]["data"].get("source"))


def _reference(source: str, run: StudyRun, protocol: EvalProtocol, open_images: OpenImages) -> dict[str, object]:
    """What its records will say of it."""
    try:
        if is_statistics_file(source):
            file = read_statistics(source)
            if file.features not in (None, protocol.features):
                told_features = f"{source} holds statistics in features {file.features}"
                raise InputError(f"{told_features}; protocol {protocol.name} measures in {protocol.features}")
            told = file.provenance or {"source": file.path.name, "split": None, "images_hash": sha256_of_file(source)}
            found = [told["source"], told["split"], file.statistics.count, told["images_hash"]]
        else:
            model = run.experiment.model
            images = open_images(source, model.sample_size, model.in_channels, protocol.reference_split or "train")
            found = [images.name, images.split, len(images), hash_of_images(images, np.arange(len(images)))]
    except InputError as error:
        raise InputError(f"reference of {run.name}: {error}; --reference DATA gives another") from None
    return dict(zip(("reference", "reference_split", "reference_count", "reference_hash"), found, strict=True))


def _refuse_others(
    record: EvaluationRecord | None, protocol: EvalProtocol, what: str, found: dict[str, object]
) -> None:
    for key, value in found.items():
        if record is not None and (on_record := getattr(record.protocol, key)) != value:
            raise InputError(
                f"{what}: its records by protocol {protocol.name} would differ from those that are there, "
                f"{key} {value} against {on_record}; go on with what these were measured with, or choose another output"
            )
