"""Checks of a study before hours are spent: recipes, runs, records, images, features and references."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache

import numpy as np

from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.distributed import check_trackers, micro_batch_size
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import build_features
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import EvaluationRecord
from dia_diffusion.evaluation.reference import hash_of_images
from dia_diffusion.evaluation.statistics_file import is_statistics_file, read_statistics
from dia_diffusion.io import sha256_of_file, step_folders
from dia_diffusion.pipelines.folder import read_training
from dia_diffusion.sampling.load import load_guide
from dia_diffusion.sweeps.collect import Inventory, RunState, records_of
from dia_diffusion.sweeps.sweep import Run, Study
from dia_diffusion.training.diffusion import check_samples
from dia_diffusion.training.run_folder import RunFolder, check_new_run, refuse_changes, refuse_other_randomness

OpenImages = Callable[[str, int, int, str], ImageSet]
"""(source, size, channels, split) -> images."""


def check_recipes(runs: Iterable[Run], protocols: Sequence[EvalProtocol] = ()) -> None:
    """Raises InputError for a network that can't be built, a batch size that can't run, or an unusable protocol."""
    checked = []
    for run in runs:
        experiment = run.experiment
        recipe = experiment.model_copy(update={"output": "", "seed": 0})
        if recipe in checked:
            continue
        checked.append(recipe)
        try:
            check_samples(experiment)
            micro_batch_size(run.batch_size, 1, experiment.train.accumulation)
            check_trackers(experiment.trackers)
        except InputError as error:
            raise InputError(f"unit {run.unit}: {error}") from None
        for protocol in protocols:
            try:
                check_samples(experiment, protocol.sampling, load_guide(protocol.guide))
            except InputError as error:
                raise InputError(f"unit {run.unit}, protocol {protocol.name}: {error}") from None


def check_runs(states: Sequence[RunState]) -> None:
    """Raises InputError if an existing run has another recipe, was trained on other images than the others, or lacks a
    needed pipeline."""
    for state in states:
        _check_run(state)
    trained = [(state.run, state.origin["data"]["fingerprint"]) for state in states if state.origin]
    for run, fingerprint in trained[1:]:
        if fingerprint != trained[0][1]:
            raise InputError(
                f"{run.folder} was trained on other images than {trained[0][0].folder}; remove one of them"
            )


def _check_run(state: RunState) -> None:
    run, origin, folder = state.run, state.origin, RunFolder(state.run.folder)
    if origin is None:
        return
    refuse_changes(origin["recipe"], run.experiment, run.folder)
    if origin["step"] > run.max_steps:
        raise InputError(
            f"{run.folder} is trained for {origin['step']:,} steps; now its training ends after {run.max_steps:,}"
        )
    if not folder.newest_checkpoint() and not state.trained:
        check_new_run(folder, run.experiment)
        return
    for step in sorted(state.to_measure - step_folders(folder.pipelines).keys()):
        if step <= origin["step"]:
            raise InputError(
                f"{run.folder} is past step {step:,} and has no pipeline to measure there; use the points that it was "
                "started with, or choose another output"
            )


def check_randomness(inventory: Inventory) -> None:
    """Raises InputError if runs are still to be trained and one was trained with another version's randomness.

    Runs are compared by seed, so no run may be trained in addition to such a run. Measuring and drawing stay possible.
    """
    if all(state.trained for state in inventory.states):
        return
    for state in inventory.states:
        origin = state.origin
        if origin is None and (records := records_of(state.run)):  # measured, but its weights were removed
            origin = {"randomness": records[-1].randomness or 1}
        if origin is not None:
            refuse_other_randomness(origin, state.run.folder)


def check_images(inventory: Inventory, progress: Callable[[int, int], None] | None = None) -> None:
    """Opens what the incomplete runs need: training images, features and reference.

    Raises:
        InputError: they can't be used, or differ from those of the existing runs and records.
        RunError: a download fails.
    """

    @cache  # training images are mostly also the reference
    def opened(source: str, size: int, channels: int, split: str) -> ImageSet:
        return open_images(source, size=size, channels=channels, split=split, progress=progress)

    missing = next((state.run for state in inventory.states if not state.trained), None)
    if missing is not None:
        data, model = missing.experiment.data, missing.experiment.model
        images = opened(data.source, model.sample_size, model.in_channels, data.split)
        for state in inventory.states:
            if state.origin and state.origin["data"]["fingerprint"] != images.fingerprint:
                raise InputError(f"{state.run.folder} was trained on other images than data.source {data.source} has")
    check_measuring(inventory, [state.run for state in inventory.states if not state.complete], opened)


def check_measuring(inventory: Inventory, unmeasured: Sequence[Run], open_images: OpenImages) -> None:
    """Opens features and reference of the runs to be measured; a reference that the study names is always opened.

    Raises:
        InputError: they can't be used, or differ from those in the records under a protocol's name.
        RunError: a download fails.
    """
    study = inventory.study
    sources = {_source(study, run): run for run in (study.runs[:1] if study.config.reference else unmeasured)}
    for protocol, on_record in inventory.on_record():
        known = on_record[0].record if on_record else None
        if unmeasured:
            features_hash = build_features(protocol.features).weights_hash
            _refuse_others(known, protocol, f"features {protocol.features}", {"features_hash": features_hash})
        references = {source: _reference(source, run, protocol, open_images) for source, run in sources.items()}
        for source, reference in references.items():
            count = reference["reference_count"]
            if protocol.reference_count not in (None, count):
                raise InputError(
                    f"reference {source} has {count} images; protocol {protocol.name} measures against "
                    f"{protocol.reference_count:,}"
                )
            _refuse_others(known, protocol, f"reference {source}", reference)
            if reference != next(iter(references.values())):
                pairs = " and ".join(f"{run.name} against {source}" for source, run in sources.items())
                what = "runs must be measured against the same reference"
                raise InputError(f"{what}, got {pairs}; use --reference DATA for all")


def _source(study: Study, run: Run) -> str:
    """The source of the reference that `fid` will use for a run; a trained run has recorded its training data."""
    if study.config.reference is not None:
        return study.config.reference
    newest = step_folders(RunFolder(run.folder).pipelines).get(run.max_steps)
    training = None if newest is None else read_training(newest)
    return str(run.experiment.data.source if training is None else training["recipe"]["data"].get("source"))


def _reference(source: str, run: Run, protocol: EvalProtocol, open_images: OpenImages) -> dict[str, object]:
    """The reference's entries in the future records."""
    try:
        if is_statistics_file(source):
            file = read_statistics(source)
            if file.features not in (None, protocol.features):
                raise InputError(
                    f"{source} holds statistics in features {file.features}; protocol {protocol.name} measures in "
                    f"{protocol.features}"
                )
            origin = file.provenance or {"source": file.path.name, "split": None, "images_hash": sha256_of_file(source)}
            values = [origin["source"], origin["split"], file.statistics.count, origin["images_hash"]]
        else:
            model = run.experiment.model
            images = open_images(source, model.sample_size, model.in_channels, protocol.reference_split or "train")
            values = [images.name, images.split, len(images), hash_of_images(images, np.arange(len(images)))]
    except InputError as error:
        raise InputError(f"reference of {run.name}: {error}; --reference DATA gives another") from None
    return dict(zip(("reference", "reference_split", "reference_count", "reference_hash"), values, strict=True))


def _refuse_others(
    record: EvaluationRecord | None, protocol: EvalProtocol, what: str, values: dict[str, object]
) -> None:
    for key, value in values.items():
        if record is not None and (on_record := getattr(record.protocol, key)) != value:
            raise InputError(
                f"{what}: new records by protocol {protocol.name} would have {key} {value}, the existing ones have "
                f"{on_record}; use the same, or choose another output"
            )
