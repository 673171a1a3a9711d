"""What a study measures with, features and reference, opened before hours are spent on what couldn't be measured."""

from collections.abc import Callable, Sequence

import numpy as np

from dia_diffusion.data import ImageSet
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import build_features
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import EvaluationRecord
from dia_diffusion.evaluation.reference import hash_of_images, is_statistics_file, read_statistics
from dia_diffusion.io import sha256_of_file, step_folders
from dia_diffusion.pipelines.folder import read_training
from dia_diffusion.studies.points import measured
from dia_diffusion.studies.study import Study, StudyRun
from dia_diffusion.training.run_folder import RunFolder

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
