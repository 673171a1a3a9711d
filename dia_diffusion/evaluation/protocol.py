"""How images are evaluated: a protocol from a small YAML file, so that the curves of many runs share it."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from dia_diffusion.data import SPLITS
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import ACCEPTED, FEATURES
from dia_diffusion.evaluation.record import EvaluationRecord
from dia_diffusion.io import shipped_folder, shipped_names
from dia_diffusion.reading import read_yaml
from dia_diffusion.sampling.samplers import PRECISIONS, check_sampler_name
from dia_diffusion.validation import Float, NonNegative, Positive, Strict, validate

WEIGHTS = ("ema",)
"""What a run's pipelines hold."""


class EvalProtocol(Strict):
    """A protocol's keys. Which images are the reference, hashes and versions are for each record to say."""

    name: str
    """The file's stem."""
    features: str
    """What the distance is measured in: digits, cifar10, inception or MODULE:CLASS."""
    num_samples: Annotated[int, Field(ge=2)]
    """Images, those of the seeds 0, 1, 2, ...; 2 or more."""
    sampler: str
    """A name in SAMPLERS, or own."""
    steps: Positive
    """Of the sampler."""
    precision: Literal[*PRECISIONS] = "float32"  # type: ignore[valid-type]
    """Of the network, a name of PRECISIONS."""
    weights: Literal[*WEIGHTS] = "ema"  # type: ignore[valid-type]
    """Which weights of a run are sampled from."""
    reference_split: Literal[*SPLITS] | None = None  # type: ignore[valid-type]
    """train or test, of a reference that has parts; None leaves it open."""
    reference_count: Annotated[int, Field(ge=2)] | None = None
    """How many images the reference must have; None is any number."""
    classes: Annotated[list[NonNegative], Field(min_length=1)] | None = None
    """Of class-conditional models, in turn by seed; None is all of a model's."""
    guidance_scale: Annotated[Float, Field(ge=1)] = 1.0
    """Of classifier-free guidance; 1 is none."""

    @classmethod
    def read(cls, name: str) -> "EvalProtocol":
        """A protocol from its file, by path or by the name of a shipped one.

        Raises:
            InputError: no such protocol, not YAML, an unknown key (the nearest is named), or an invalid value.
        """
        path = Path(name) if Path(name).is_file() else shipped_folder("protocols") / f"{name}.yaml"
        if not path.is_file():
            raise InputError(
                f"a protocol must be a YAML file or one of {', '.join(shipped_names('protocols'))}, got {name!r}"
            )
        values = read_yaml(path, "protocol", "features, num_samples, sampler, steps")
        if "name" in values:
            raise InputError(f"{path}: unknown key `name`; a protocol is named by its file")
        return validate(cls, {**values, "name": path.stem}, f"{path}: ")

    @field_validator("features")
    @classmethod
    def _check_features(cls, features: str) -> str:
        if features not in (*FEATURES, "inception") and not all(features.partition(":")):
            raise ValueError(f"one of {ACCEPTED}")
        return features

    @field_validator("sampler")
    @classmethod
    def _check_sampler(cls, sampler: str) -> str:
        check_sampler_name(sampler)
        return sampler

    def hash(self) -> str:
        """sha256 over its settings, not its name; what has its default is left out, so that a new key changes none."""
        settings = {
            name: value
            for name, field in type(self).model_fields.items()
            if name != "name" and (value := getattr(self, name)) != field.default
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def named_in(self, record: EvaluationRecord) -> bool:
        """Whether a record was made under this name and these settings."""
        return (record.protocol_name, record.protocol_file_hash) == (self.name, self.hash())

    def refuse_changed(self, records: Iterable[EvaluationRecord], place: str | Path) -> None:
        """Raises InputError if records in `place` have this protocol's name but were made with other settings."""
        for record in records:
            if record.protocol_name == self.name and not self.named_in(record):
                theirs, own = str(record.protocol_file_hash)[:8], self.hash()[:8]
                raise InputError(
                    f"{place} has records of a protocol {self.name} with other settings (hash {theirs}, now {own}); "
                    "give the changed protocol another name, or remove these records"
                )


def under_name(record: EvaluationRecord, protocol: EvalProtocol | None) -> EvaluationRecord:
    """A record under a protocol's name; itself where it is already, or where there is no name."""
    if protocol is None or protocol.named_in(record):
        return record
    return dataclasses.replace(record, protocol_name=protocol.name, protocol_file_hash=protocol.hash())
