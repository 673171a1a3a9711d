"""The results of a study so far: points, tables and figures, and the files that hold them."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.errors import InputError, RunError
from dia_diffusion.evaluation.curves import distance_label
from dia_diffusion.evaluation.features import FEATURES, FeatureExtractor, build_features
from dia_diffusion.evaluation.frechet import FeatureStatistics, GivenMoments, frechet_distance
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import EvaluationRecord, recorded_floor
from dia_diffusion.evaluation.reference import floor_distance, reference_statistics
from dia_diffusion.io import write_json, write_text
from dia_diffusion.reading import read_json_object
from dia_diffusion.reading.typed import from_json
from dia_diffusion.sweeps.collect import Measured, Point, collect, measured, training_cost
from dia_diffusion.sweeps.figure import draw_curves_of_study, draw_final_distances
from dia_diffusion.sweeps.plan import read_plan, set_against
from dia_diffusion.sweeps.stats import LEVEL, Row, summarize
from dia_diffusion.sweeps.sweep import Study
from dia_diffusion.sweeps.table import Table, tables
from dia_diffusion.sweeps.table import notes as table_notes

__all__ = ["Measurement", "Results", "collect", "results_of", "write_results"]


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


RESULTS_FILE = "results.json"
TABLE_FILE = "results.md"


@dataclass(frozen=True)
class Measurement:
    """Points by one protocol."""

    protocol: str
    """Its name."""
    record: EvaluationRecord
    """One of them, for the protocol that all of them share."""
    points: list[Point]
    seconds: float
    """What measuring them took, all together."""
    versions: list[dict[str, str]]
    """That they were measured with; one where they agree."""
    floor: Floor | str
    """Or why there is none."""

    @property
    def metric(self) -> str:
        """As "FID, 10,000 samples"."""
        return distance_label(self.record)

    @property
    def told(self) -> str:
        """As "FID, 10,000 samples (fid10k-dpm50)"."""
        return f"{self.metric} ({self.protocol})"

    @property
    def floor_distance(self) -> float | None:
        """None where there is none."""
        return self.floor.distance if isinstance(self.floor, Floor) else None

    def to_dict(self) -> dict[str, Any]:
        """Name, hash and settings of the protocol, and the floor, for JSON."""
        floor = {"missing": self.floor} if isinstance(self.floor, str) else dataclasses.asdict(self.floor)
        return {
            "name": self.protocol,
            "hash": self.record.protocol_file_hash,
            "metric": self.record.metric,
            "samples": self.record.protocol.num_samples,
            "settings": dataclasses.asdict(self.record.protocol),
            "settings_hash": self.record.protocol_hash(),
            "floor": floor,
            "versions": self.versions,
        }


@dataclass(frozen=True)
class Results:
    """Of a study, whole or not."""

    study: Study
    curve: Measurement
    final: Measurement | None
    """Of the ends of training: by the final protocol where there is one and it has been used, else by the curves'."""
    rows: list[Row]

    @property
    def tables(self) -> list[Table]:
        """The rows as text."""
        return tables(self.rows, self.curve.told, (self.final or self.curve).told)

    @property
    def notes(self) -> list[str]:
        """What the tables don't say, a sentence or two each: how much of the study is done, tests, and floors."""
        trained, planned = sum(row.seconds.count for row in self.rows if row.seconds), len(self.study.runs)
        told = [] if trained == planned else [f"{trained} of {planned} runs are trained."]
        wanted = self.study.config.final_protocol
        if wanted and (self.final is None or self.final.protocol != EvalProtocol.read(wanted).name):
            told.append(f"Nothing is measured by the final protocol {EvalProtocol.read(wanted).name} yet.")
        told += table_notes(self.rows)
        for one in {one.protocol: one for one in (self.curve, self.final) if one}.values():
            if isinstance(one.floor, Floor):
                told.append(f"Real images reach {one.floor.distance:.3g} by {one.protocol} ({one.floor.images}).")
            else:
                told.append(f"No floor by {one.protocol}: {one.floor}.")
        return told


def results_of(study: Study) -> Results:
    """What is on record of a study.

    Raises:
        InputError: nothing is; or records that can't be used, see `points.measured`.
    """
    found = measured(study, study.config.protocol)
    if not found:
        raise InputError(
            f"{study.folder} has no evaluations by protocol {EvalProtocol.read(study.config.protocol).name} yet; "
            "`dia-diffusion curves` without --only-plot makes them"
        )
    before = _known_floors(study)
    curve = _measurement(study, study.config.protocol, found, before)
    protocol, ends = study.config.protocol, [one for one in found if one.is_last]
    if study.config.final_protocol:
        by_final = [one for one in measured(study, study.config.final_protocol) if one.is_last]
        protocol, ends = (study.config.final_protocol, by_final) if by_final else (protocol, ends)
    final = _measurement(study, protocol, ends, before) if ends else None
    costs = {run.name: cost for run in study.runs if (cost := training_cost(run))}
    return Results(study, curve, final, summarize(study, curve.points, final.points if final else [], costs))


def write_results(study: Study, results: Results | None = None) -> list[Path]:
    """Writes results.json, results.md and the figures into the study's folder, and returns their paths.

    Raises:
        InputError: as `results_of`.
    """
    results = results or results_of(study)
    folder, curve, final = study.folder, results.curve, results.final
    curves, final_figure = folder / "curves.png", folder / "final.png"
    draw_curves_of_study(curve.points, study.units, curves, metric=curve.metric, floor=curve.floor_distance)
    write_json(folder / RESULTS_FILE, _to_dict(study, results))
    write_text(folder / TABLE_FILE, _markdown(study, results))
    written = [curves, folder / RESULTS_FILE, folder / TABLE_FILE]
    if final:
        draw_final_distances(final.points, study.units, final_figure, metric=final.metric, floor=final.floor_distance)
        written.insert(1, final_figure)
    return written


def _measurement(study: Study, protocol: str, found: Sequence[Measured], before: dict[str, Floor]) -> Measurement:
    record = found[-1].record
    versions = {json.dumps(one.record.versions): one.record.versions for one in found}
    floor: Floor | str
    try:
        floor = before.get(record.protocol_hash()) or floor_of(study, record)
    except (InputError, RunError) as error:  # RunError: of a download
        floor = str(error)
    points, seconds = [one.point for one in found], sum(one.record.seconds for one in found)
    return Measurement(EvalProtocol.read(protocol).name, record, points, seconds, list(versions.values()), floor)


def _known_floors(study: Study) -> dict[str, Floor]:
    """Hash of a protocol -> its floor, of the results that are there, so that drawing again measures nothing."""
    try:
        before = read_json_object(study.folder / RESULTS_FILE)
        told = [before["protocol"], before["final_protocol"] or before["protocol"]]
        known = {one["settings_hash"]: from_json(Floor, one["floor"]) for one in told if "distance" in one["floor"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {} if (study.folder / FILE).is_file() else known


def _to_dict(study: Study, results: Results) -> dict[str, Any]:
    curve, final = results.curve, results.final
    return {
        "study": study.name,
        "recipe": study.config.recipe,
        "units": study.units,
        "batch_sizes": study.batch_sizes,
        "runs_planned": len(study.runs),
        "runs_trained": sum(row.seconds.count for row in results.rows if row.seconds),
        "level": LEVEL,
        "plan": _plan(study),
        "seconds": _seconds(results),
        "protocol": curve.to_dict(),
        "final_protocol": final.to_dict() if final else None,
        "summary": [dataclasses.asdict(row) for row in results.rows],
        "points": [dataclasses.asdict(point) for point in curve.points],
        "final_points": [dataclasses.asdict(point) for point in final.points] if final else [],
    }


def _plan(study: Study) -> dict[str, Any] | None:
    """What `--plan` had estimated, and what that took since; None where it wasn't asked."""
    if (plan := read_plan(study)) is None:
        return None
    return dataclasses.asdict(plan) | {"taken": [dataclasses.asdict(taken) for taken in set_against(plan, study)]}


def _seconds(results: Results) -> dict[str, float]:
    """What it took: training and measuring, of all runs together, whether one after the other or side by side."""
    curve, final = results.curve, results.final
    training = sum(row.seconds.mean * row.seconds.count for row in results.rows if row.seconds)
    measuring = curve.seconds + (final.seconds if final and final.protocol != curve.protocol else 0.0)
    return {"training": round(training, 1), "measuring": round(measuring, 1)}


def _markdown(study: Study, results: Results) -> str:
    """The tables with what a reader has to know of them, to be pasted into a page."""
    parts = [f"# {study.name}\n"]
    for table in results.tables:
        parts += [f"{table.title}.\n", table.markdown()]
    parts.append("\n\n".join(results.notes) + "\n")
    return "\n".join(parts)
