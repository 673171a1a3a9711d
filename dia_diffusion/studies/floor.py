"""The floor of a study: the distance that as many real images have to its reference."""

from dataclasses import dataclass

from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import FEATURES, FeatureExtractor, build_features
from dia_diffusion.evaluation.frechet import FeatureStatistics, GivenMoments, frechet_distance
from dia_diffusion.evaluation.record import EvaluationRecord, recorded_floor
from dia_diffusion.evaluation.reference import floor_distance, reference_statistics
from dia_diffusion.studies.study import Study

FILE = "floor.jsonl"
"""In the study's folder, where a person has recorded real images by `fid --record`."""
OTHER = {"train": "test", "test": "train"}


@dataclass(frozen=True)
class Floor:
    """What a perfect model would reach."""

    distance: float
    images: str
    """Which real images stand for the samples."""


def floor_of(study: Study, record: EvaluationRecord) -> Floor:
    """The floor of a study's records, of which this is one.

    It is that of FILE where there is one. Else images of the reference's other split stand for the samples; of a source
    without parts, as many as there are samples, against the reference's others. Both are chosen by seed 0.

    Raises:
        InputError: why there is none: other features than the package's, which take long or a download; too few real
            images; or a reference that isn't there any more.
    """
    file = study.folder / FILE
    if file.is_file():
        return Floor(recorded_floor(file, record), f"on record in {FILE}")
    protocol, source = record.protocol, study.config.reference or study.runs[0].experiment.data.source
    if protocol.features not in FEATURES:
        raise InputError(
            f"real images aren't measured in features {protocol.features} while drawing; "
            f"`dia-diffusion fid IMAGES ... --record {file}` does it"
        )
    if protocol.reference_shape is None:
        raise InputError(f"{protocol.reference} doesn't say which images it is of")
    channels, size, _ = protocol.reference_shape
    split, count = protocol.reference_split, protocol.num_samples
    images = open_images(source, size=size, channels=channels, split=split or "train")
    extractor = build_features(protocol.features)
    reference = reference_statistics(images, extractor)
    if (reference.hash, extractor.weights_hash) != (protocol.reference_hash, protocol.features_hash):
        raise InputError(f"{source} isn't the reference {protocol.reference} that the runs were measured against")
    if split is None:
        return Floor(_within(images, extractor, count), f"{count:,} of the reference's against its others")
    others = open_images(source, size=size, channels=channels, split=OTHER[split])
    return Floor(floor_distance(reference, others, extractor, count=count), f"{count:,} of the {OTHER[split]} split")


def _within(images: ImageSet, extractor: FeatureExtractor, count: int) -> float:
    """The distance of `count` of these images, chosen by seed 0, to the others, which are at least as many."""
    if 2 * count > len(images):
        raise InputError(f"{images.name} has {len(images):,} images; accepted: twice the {count:,} samples or more")
    every = reference_statistics(images, extractor).statistics
    chosen = reference_statistics(images, extractor, count=count, seed=0).statistics
    return frechet_distance(chosen, _without(every, chosen))


def _without(every: FeatureStatistics | GivenMoments, part: FeatureStatistics | GivenMoments) -> FeatureStatistics:
    assert isinstance(every, FeatureStatistics) and isinstance(part, FeatureStatistics)
    rest = FeatureStatistics(len(every.sum))
    rest.count, rest.sum, rest.outer = every.count - part.count, every.sum - part.sum, every.outer - part.outer
    return rest
