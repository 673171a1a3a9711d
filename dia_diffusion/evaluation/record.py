"""Evaluation records: a distance with everything it depends on, one line of JSON per evaluation.

To record another setting that changes the numbers, such as a crop of the images, add it to `ResolvedProtocol` with
`added_field(default)`, where the default is the behavior before the field existed. At its default it is left out of the
hash, so records with and without the field have the same protocol: they share a curve, and none is measured again. A
field of `Origin` or `EvaluationRecord` only needs a default.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dia_diffusion.environment import installed_versions
from dia_diffusion.errors import InputError
from dia_diffusion.io import append_json_line, sha256_of_json, verify_checksum
from dia_diffusion.reading import Unreadable, parse_json, read_lines
from dia_diffusion.reading.typed import from_json

RECORD_VERSION = 2
"""Version of written lines. Lines of version 1 lack it and have no added fields: their hash is over all fields."""


def added_field(default: Any) -> Any:
    """A field of ResolvedProtocol that version 1 didn't have."""
    return field(default=default, metadata={"added": True})


@dataclass(frozen=True, kw_only=True)
class ResolvedProtocol:
    """How a distance was measured: what must agree between the points of a curve. None: doesn't apply."""

    features: str
    features_hash: str
    """sha256 of the weights: of a packaged file, or of the tensors (`features.extractor.state_hash`)."""
    reference: str
    reference_split: str | None
    reference_shape: tuple[int, int, int] | None
    """(C, H, W) of the reference's images, after any reduction."""
    reference_count: int | None
    reference_hash: str
    num_samples: int
    seeds: str | None = None
    """Seeds of the sampled images, such as `0-999`."""
    sampler: str | None = None
    scheduler: dict[str, Any] | None = None
    """The settings of the sampler's scheduler, such as timestep_spacing and clip_sample; `process` if it isn't VP."""
    num_inference_steps: int | None = None
    class_labels: str | None = None
    guidance_scale: float | None = None
    weights: str | None = None
    """`ema` or `raw`."""
    dtype: str | None = None
    """Dtype of the model while sampling, such as `float32`."""
    guidance_interval: list[float] | None = added_field(None)
    """Low and high, in sigma / alpha; None: guidance everywhere."""
    guide: dict[str, str] | None = added_field(None)
    """weights_hash and model_hash of the autoguidance pipeline."""

    def to_dict(self) -> dict[str, Any]:
        """Its fields as plain values, without added fields at their default."""
        values = dataclasses.asdict(self)
        for each in dataclasses.fields(self):
            if each.metadata.get("added") and values[each.name] == each.default:
                del values[each.name]
        return values

    def hash(self) -> str:
        """sha256 over `to_dict`."""
        return sha256_of_json(self.to_dict())

    def differences(self, other: "ResolvedProtocol") -> dict[str, tuple[Any, Any]]:
        """The fields that differ, each with this protocol's value and the other's.

        A sampler has different settings for each noise process, so they are compared only within the same process.
        """
        pairs = {name: (value, getattr(other, name)) for name, value in vars(self).items()}
        processes = [(each.scheduler or {}).get("process") for each in (self, other)]
        if processes[0] != processes[1]:
            del pairs["scheduler"]
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The origin of the measured images. None: not known, as for a folder of images."""

    source: str
    """The run, pipeline, folder or archive that was named."""
    split: str | None = None
    """Its split, for images that have splits."""
    run: str | None = None
    step: int | None = None
    images_seen: int | None = None
    unit: str | None = None
    """The attention unit, `none` for a model without one."""
    batch_size: int | None = None
    seed: int | None = None
    randomness: int | None = None
    """Version of the random streams used in training (`training.randomness`); None: not known, as for `seed`, or an
    older record of a run, which is version 1."""
    weights_hash: str | None = None
    model_hash: str | None = None
    """Hash of the pipeline's class and its parts' configs, see `pipelines.folder.model_hash`; None for images."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(Origin):
    """One evaluation: the origin of the images, the distance, and the protocol it was measured with."""

    metric: str
    """`FID` only for Inception's features, else `FD(features)`."""
    distance: float
    protocol: ResolvedProtocol
    versions: dict[str, str]
    time: str
    """ISO 8601, UTC."""
    seconds: float
    """Time to make and measure the images."""
    low: float | None = None
    high: float | None = None
    """The ends of the distance's bootstrap interval, see `bootstrap_interval`; None: not requested."""
    standard_error: float | None = None
    """The standard deviation of the resampled distances."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Other numbers from the same images, such as `KD(digits)`, from rows of `METRICS`."""
    metric_settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of the metrics and the interval, which `protocol` doesn't include, since it covers only the distance."""
    protocol_name: str | None = None
    """Name of the `EvalProtocol` it was measured with; None: measured with options."""
    protocol_file_hash: str | None = None
    """`EvalProtocol.hash`; `protocol_hash` is over the resolved protocol."""

    def has(self, settings: dict[str, dict[str, Any]]) -> bool:
        """Whether it holds all the numbers of these settings (`EvalProtocol.metric_settings`)."""
        return all(self.metric_settings.get(name) == values for name, values in settings.items())

    def protocol_hash(self) -> str:
        """The resolved protocol's hash."""
        return self.protocol.hash()

    def to_dict(self) -> dict[str, Any]:
        """The line of a file as plain values: the fields, the protocol's hash, and the version."""
        added = {"protocol_hash": self.protocol_hash(), "record_version": RECORD_VERSION}
        return dataclasses.asdict(self) | {"protocol": self.protocol.to_dict()} | added

    @classmethod
    def from_dict(cls, line: dict[str, Any]) -> "EvaluationRecord":
        """The record of such a line. Raises ValueError, KeyError, TypeError or AttributeError if it is incomplete."""
        fields = {name: value for name, value in line.items() if name not in ("protocol_hash", "record_version")}
        shape = fields["protocol"]["reference_shape"]
        protocol = {**fields["protocol"], "reference_shape": None if shape is None else tuple(shape)}
        record = from_json(cls, {**fields, "protocol": from_json(ResolvedProtocol, protocol)})
        if not all(map(math.isfinite, filter(None, (record.distance, record.low, record.high, record.seconds)))):
            raise ValueError("a distance or time that is not finite")
        return record


NUMBER_PARTS = ("std", "low", "high")
"""Suffixes of values that a record's `metrics` may have in addition to a number, as in "KD(digits) std"."""


def numbers_of(record: EvaluationRecord) -> list[str]:
    """The names of the record's metrics, without their standard deviations and intervals."""
    return [name for name in record.metrics if name.rpartition(" ")[2] not in NUMBER_PARTS]


def describe_number(record: EvaluationRecord, name: str) -> str:
    """One of the record's metrics, with its standard deviation or interval; empty if it isn't there."""
    std, low, high = (record.metrics.get(f"{name} {part}") for part in NUMBER_PARTS)
    spread = "" if std is None else f" ± {std:.4f}"
    interval = "" if low is None or high is None else f" [{low:.4f}, {high:.4f}]"
    return f"{record.metrics[name]:.4f}{spread}{interval}" if name in record.metrics else ""


def make_record(
    distance: float, protocol: ResolvedProtocol, origin: Origin, seconds: float, **optional: Any
) -> EvaluationRecord:
    """The record of a distance measured just now; `optional` has fields from `low` on."""
    return EvaluationRecord(
        **vars(origin),
        metric=distance_name(protocol.features),
        distance=distance,
        protocol=protocol,
        versions=installed_versions(),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        **optional,
    )


def distance_name(features: str) -> str:
    """The name of a Frechet distance in these features."""
    return "FID" if features == "inception" else f"FD({features})"


def append_record(path: str | Path, record: EvaluationRecord) -> None:
    """Adds the record to a JSON-lines file, such as a run's evaluations.jsonl."""
    append_json_line(path, record.to_dict())


def read_records(path: str | Path) -> list[EvaluationRecord]:
    """The records of a file that `append_record` wrote, in its order.

    Raises InputError if there is no such file, or if a line is truncated or not a record (the message names the line).
    """
    try:
        lines = read_lines(Path(path))
    except (OSError, Unreadable) as error:
        raise InputError(f"{path} can't be read as evaluation records ({error})") from error
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def count_records(path: str | Path) -> int:
    """The number of records in a file, without parsing them; 0 if there is no file."""
    path = Path(path)
    return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0


def _parse(line: str, place: str) -> EvaluationRecord:
    try:
        fields = verify_checksum(parse_json(line))
        version = fields.get("record_version", 1)
        record = EvaluationRecord.from_dict(fields) if version in (1, RECORD_VERSION) else None
        written_hash = str(fields["protocol_hash"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{place}: not a complete evaluation record; remove that line ({error})") from error
    if record is None:
        raise InputError(
            f"{place}: `record_version` must be {RECORD_VERSION} or less, got {version}; a newer dia-diffusion wrote it"
        )
    if record.protocol_hash() != written_hash:
        raise InputError(f"{place}: the protocol was changed after it was recorded (hash {written_hash[:12]})")
    return record


SHARED_WITH_FLOOR = ("features", "features_hash", "reference_hash", "num_samples")


def recorded_floor(file: Path, record: EvaluationRecord) -> float:
    """The distance of real images from a file that `fid` recorded them in: the newest that is comparable to `record`.

    Raises:
        InputError: there is none; the message says what differs.
    """
    reason = ""
    for candidate in reversed(read_records(file)):
        differences = candidate.protocol.differences(record.protocol)
        different = [name for name in SHARED_WITH_FLOOR if name in differences]
        if candidate.protocol.seeds is None and not different:
            return candidate.distance
        reason = reason or ", ".join(
            f"{name} {differences[name][0]} there, {differences[name][1]} here" for name in different
        )
    raise InputError(
        f"{file} has no record of real images measured with the protocol of the runs: {reason or 'only samples'}"
    )
