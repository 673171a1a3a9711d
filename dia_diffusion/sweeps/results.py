"""The results of a study so far: points, tables, floor and figures, and the files they are written to."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.errors import InputError, RunError
from dia_diffusion.evaluation.curves import distance_label
from dia_diffusion.evaluation.features import PACKAGED, FeatureExtractor, build_features
from dia_diffusion.evaluation.frechet import FeatureStatistics, frechet_distance
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import EvaluationRecord, recorded_floor
from dia_diffusion.evaluation.reference import OTHER_SPLIT, floor_distance, reference_statistics
from dia_diffusion.io import write_json, write_text
from dia_diffusion.reading import read_json_object
from dia_diffusion.reading.typed import from_json
from dia_diffusion.sweeps.collect import Inventory, Measured, Point, training_cost
from dia_diffusion.sweeps.figures import draw_curves_of_study, draw_final_distances
from dia_diffusion.sweeps.stats import LEVEL, Row, summarize
from dia_diffusion.sweeps.sweep import Study
from dia_diffusion.sweeps.table import notes as table_notes
from dia_diffusion.sweeps.table import tables
from dia_diffusion.tables import Table

RESULTS_FILE = "results.json"
TABLE_FILE = "results.md"
FLOOR_FILE = "floor.jsonl"
"""In the study's folder: records of real images, made by `fid --record`."""


@dataclass(frozen=True)
class Floor:
    """The distance that a perfect model would reach."""

    distance: float
    images: str
    """Which real images take the place of samples."""


@dataclass(frozen=True)
class Measurement:
    """Points measured by one protocol."""

    protocol: str
    """The protocol's name."""
    record: EvaluationRecord
    """One of the points' records, for the settings that they all share."""
    points: list[Point]
    seconds: float
    """Total time of measuring."""
    versions: list[dict[str, str]]
    """Versions that the points were measured with; a single one if they agree."""
    floor: Floor | str
    """The floor, or why there is none."""

    @property
    def metric(self) -> str:
        """Such as "FID, 10,000 samples"."""
        return distance_label(self.record)

    @property
    def title(self) -> str:
        """Such as "FID, 10,000 samples (fid10k-dpm50)"."""
        return f"{self.metric} ({self.protocol})"

    @property
    def floor_distance(self) -> float | None:
        return self.floor.distance if isinstance(self.floor, Floor) else None

    def to_dict(self) -> dict[str, Any]:
        """Name, hash and settings of the protocol, and the floor, for JSON."""
        return {
            "name": self.protocol,
            "hash": self.record.protocol_file_hash,
            "metric": self.record.metric,
            "samples": self.record.protocol.num_samples,
            "settings": asdict(self.record.protocol),
            "settings_hash": self.record.protocol_hash(),
            "floor": {"missing": self.floor} if isinstance(self.floor, str) else asdict(self.floor),
            "versions": self.versions,
        }


@dataclass(frozen=True)
class Results:
    """The results of a complete or incomplete study."""

    inventory: Inventory
    curve: Measurement
    final: Measurement | None
    """Points at the end of training: by the final protocol if it has records, else by the curves' protocol."""
    rows: list[Row]

    @property
    def trained(self) -> int:
        return sum(state.trained for state in self.inventory.states)

    @property
    def tables(self) -> list[Table]:
        """The rows as tables of text."""
        return tables(self.rows, self.curve.title, (self.final or self.curve).title)

    @property
    def notes(self) -> list[str]:
        """Notes of a sentence or two each on what the tables don't show: progress, tests, and floors."""
        study = self.inventory.study
        missing = self.trained != len(study.runs)
        notes = [f"{self.trained} of {len(study.runs)} runs are trained."] if missing else []
        if study.final_protocol and (self.final is None or self.final.protocol != study.final_protocol.name):
            notes.append(f"Nothing is measured by the final protocol {study.final_protocol.name} yet.")
        notes += table_notes(self.rows)
        for one in {one.protocol: one for one in (self.curve, self.final) if one}.values():
            if isinstance(one.floor, Floor):
                notes.append(f"Real images reach {one.floor.distance:.3g} by {one.protocol} ({one.floor.images}).")
            else:
                notes.append(f"No floor by {one.protocol}: {one.floor}.")
        return notes


def results_of(inventory: Inventory) -> Results:
    """The recorded results of a study, and its floors.

    Raises:
        InputError: there are none.
    """
    study, curve = inventory.study, inventory.curve
    if not curve:
        raise InputError(
            f"{study.folder} has no evaluations by protocol {study.protocol.name} yet; "
            "`dia-diffusion curves` without --only-plot makes them"
        )
    known = _known_floors(study)
    if study.final_protocol and inventory.final:
        protocol, ends = study.final_protocol, inventory.final
    else:
        protocol, ends = study.protocol, [one for one in curve if one.is_last]
    measurement = _measurement(study, study.protocol, curve, known)
    final = _measurement(study, protocol, ends, known) if ends else None
    costs = {run.name: cost for run in study.runs if (cost := training_cost(run))}
    rows = summarize(study, measurement.points, final.points if final else [], costs)
    return Results(inventory, measurement, final, rows)


def write_results(results: Results) -> list[Path]:
    """Writes results.json, results.md and the figures into the study's folder, and returns their paths."""
    study, curve, final = results.inventory.study, results.curve, results.final
    folder = study.folder
    written = [folder / "curves.png"]
    draw_curves_of_study(curve.points, study.units, written[0], metric=curve.metric, floor=curve.floor_distance)
    if final:
        written.append(folder / "final.png")
        draw_final_distances(final.points, study.units, written[1], metric=final.metric, floor=final.floor_distance)
    write_json(folder / RESULTS_FILE, _to_dict(results))
    parts = [f"# {study.name}\n"]
    for table in results.tables:
        parts += [f"{table.title}.\n", table.to_markdown()]
    write_text(folder / TABLE_FILE, "\n".join([*parts, "\n\n".join(results.notes) + "\n"]))
    return [*written, folder / RESULTS_FILE, folder / TABLE_FILE]


def _to_dict(results: Results) -> dict[str, Any]:
    study, curve, final = results.inventory.study, results.curve, results.final
    training = sum(row.seconds.mean * row.seconds.count for row in results.rows if row.seconds)
    measuring = curve.seconds + (final.seconds if final and final.protocol != curve.protocol else 0.0)
    return {
        "study": study.name,
        "recipe": study.config.recipe,
        "units": study.units,
        "batch_sizes": study.batch_sizes,
        "runs_planned": len(study.runs),
        "runs_trained": results.trained,
        "level": LEVEL,
        "seconds": {"training": round(training, 1), "measuring": round(measuring, 1)},  # total of all runs
        "protocol": curve.to_dict(),
        "final_protocol": final.to_dict() if final else None,
        "summary": [asdict(row) for row in results.rows],
        "points": [asdict(point) for point in curve.points],
        "final_points": [asdict(point) for point in final.points] if final else [],
    }


def _measurement(
    study: Study, protocol: EvalProtocol, measured: Sequence[Measured], known: dict[str, Floor]
) -> Measurement:
    record = measured[-1].record
    versions = {json.dumps(one.record.versions): one.record.versions for one in measured}
    floor: Floor | str
    try:
        floor = known.get(record.protocol_hash()) or floor_of(study, record)
    except (InputError, RunError) as error:  # RunError: a download failed
        floor = str(error)
    points, seconds = [one.point for one in measured], sum(one.record.seconds for one in measured)
    return Measurement(protocol.name, record, points, seconds, list(versions.values()), floor)


def _known_floors(study: Study) -> dict[str, Floor]:
    """Hash of a protocol -> its floor in the existing results file, so that drawing again measures nothing."""
    if (study.folder / FLOOR_FILE).is_file():
        return {}
    try:
        before = read_json_object(study.folder / RESULTS_FILE)
        measurements = [before["protocol"], before["final_protocol"] or before["protocol"]]
        return {m["settings_hash"]: from_json(Floor, m["floor"]) for m in measurements if "distance" in m["floor"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def floor_of(study: Study, record: EvaluationRecord) -> Floor:
    """The floor for a study's records, given one of them: the distance of the same number of real images.

    It comes from FLOOR_FILE if that exists. Otherwise images of the reference's other split take the place of samples;
    if the source has no splits, some of the reference's images are compared with its others. Seed 0 chooses them.

    Raises:
        InputError: the reason why there is no floor: features other than the package's, which are slow or need a
            download; too few real images; or the reference is gone.
    """
    file = study.folder / FLOOR_FILE
    if file.is_file():
        return Floor(recorded_floor(file, record), f"on record in {FLOOR_FILE}")
    protocol, source = record.protocol, study.config.reference or study.runs[0].experiment.data.source
    if protocol.features not in PACKAGED:
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
    others = open_images(source, size=size, channels=channels, split=OTHER_SPLIT[split])
    distance = floor_distance(reference, others, extractor, count=count)
    return Floor(distance, f"{count:,} of the {OTHER_SPLIT[split]} split")


def _within(images: ImageSet, extractor: FeatureExtractor, count: int) -> float:
    """The distance of `count` of these images, chosen by seed 0, to the others, of which there are at least `count`."""
    if 2 * count > len(images):
        raise InputError(f"{images.name} must have twice the {count:,} samples or more, got {len(images):,} images")
    every = reference_statistics(images, extractor).statistics
    chosen = reference_statistics(images, extractor, count=count, seed=0).statistics
    assert isinstance(every, FeatureStatistics) and isinstance(chosen, FeatureStatistics)
    return frechet_distance(chosen, every.merge(chosen, sign=-1))
