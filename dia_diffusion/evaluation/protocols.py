"""Named protocols: small YAML files that fix how a distance is measured, so that curves of many runs can share it."""

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jsonargparse

from dia_diffusion.data import SPLITS
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import ACCEPTED, FEATURES
from dia_diffusion.evaluation.record import EvaluationRecord
from dia_diffusion.io import shipped_folder, shipped_names
from dia_diffusion.reading import read_yaml
from dia_diffusion.reading.typed import check_types
from dia_diffusion.sampling.samplers import check_sampler_name
from dia_diffusion.sampling.settings import PRECISIONS

WEIGHTS = ("ema",)
"""What a run's pipelines hold."""


@dataclass(frozen=True)
class NamedProtocol:
    """A protocol's keys. Which images are the reference, hashes and versions are for each record to say."""

    name: str
    """The file's stem."""
    features: str
    """What the distance is measured in: digits, cifar10, inception or MODULE:CLASS."""
    num_samples: int
    """Images, those of the seeds 0, 1, 2, ...; 2 or more."""
    sampler: str
    """A name of SAMPLER_NAMES."""
    steps: int
    """Of the sampler."""
    precision: str = "float32"
    """Of the network, a name of PRECISIONS."""
    weights: str = "ema"
    """Which weights of a run are sampled from."""
    reference_split: str | None = None
    """train or test, of a reference that has parts; None leaves it open."""
    reference_count: int | None = None
    """How many images the reference must have; None is any number."""
    classes: tuple[int, ...] | None = None
    """Of class-conditional models, in turn by seed; None is all of a model's."""
    guidance_scale: float = 1.0
    """Of classifier-free guidance; 1 is none."""

    def hash(self) -> str:
        """sha256 over its settings, not its name; what has its default is left out, so that a new key changes none."""
        settings = {
            field.name: value
            for field in dataclasses.fields(self)
            if field.name != "name" and (value := getattr(self, field.name)) != field.default
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def named_in(self, record: EvaluationRecord) -> bool:
        """Whether a record was made under this name and these settings."""
        return (record.protocol_name, record.protocol_file_hash) == (self.name, self.hash())


def read_protocol(name: str) -> NamedProtocol:
    """A protocol from its file, by path or by the name of a shipped one.

    Raises:
        InputError: no such protocol, not YAML, an unknown key (the nearest is named), or a value that isn't accepted.
    """
    path = Path(name) if Path(name).is_file() else shipped_folder("protocols") / f"{name}.yaml"
    if not path.is_file():
        raise InputError(
            f"no protocol {name!r}; accepted: a YAML file or one of {', '.join(shipped_names('protocols'))}"
        )
    values = read_yaml(path, "protocol", "features, num_samples, sampler, steps")
    known = [field.name for field in dataclasses.fields(NamedProtocol) if field.name != "name"]
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise InputError(f"{path}: unknown key {key!r}; did you mean {nearest!r}?")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(NamedProtocol, nested_key=None, skip={"name"})
    try:
        protocol = NamedProtocol(path.stem, **vars(parser.instantiate(parser.parse_object(values))))
        check_types(protocol)
        _check(protocol)
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    return protocol


def under_name(record: EvaluationRecord, protocol: NamedProtocol | None) -> EvaluationRecord:
    """A record under a protocol's name; itself where it is already, or where there is no name."""
    if protocol is None or protocol.named_in(record):
        return record
    return dataclasses.replace(record, protocol_name=protocol.name, protocol_file_hash=protocol.hash())


def refuse_changed(records: Iterable[EvaluationRecord], protocol: NamedProtocol, place: str | Path) -> None:
    """Raises InputError where records of `place` were made under this protocol's name when it had other settings."""
    for record in records:
        if record.protocol_name == protocol.name and not protocol.named_in(record):
            theirs, own = str(record.protocol_file_hash)[:8], protocol.hash()[:8]
            raise InputError(
                f"{place} has records of a protocol {protocol.name} with other settings (hash {theirs}, now {own}); "
                "give the changed protocol another name, or remove these records"
            )


def _check(protocol: NamedProtocol) -> None:
    features, classes, scale = protocol.features, protocol.classes, protocol.guidance_scale
    split, count = protocol.reference_split, protocol.reference_count
    check_sampler_name(protocol.sampler)
    for key, told, accepted, right in (
        ("features", features, ACCEPTED, features in (*FEATURES, "inception") or all(features.partition(":"))),
        ("num_samples", protocol.num_samples, "2 or more", protocol.num_samples >= 2),
        ("steps", protocol.steps, "1 or more", protocol.steps >= 1),
        ("precision", protocol.precision, ", ".join(PRECISIONS), protocol.precision in PRECISIONS),
        ("weights", protocol.weights, ", ".join(WEIGHTS), protocol.weights in WEIGHTS),
        ("reference_split", split, ", ".join(SPLITS), split in (None, *SPLITS)),
        ("reference_count", count, "2 or more", count is None or count >= 2),
        ("classes", list(classes or ()), "numbers from 0", classes is None or (classes and min(classes) >= 0)),
        ("guidance_scale", scale, "1, which is none, or more", 1 <= scale < math.inf),
    ):
        if not right:
            raise InputError(f"{key} is {told}; accepted: {accepted}")
