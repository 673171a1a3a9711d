"""What an evaluation measures: `EvalProtocol`, from a YAML file that many runs share, or from the options of `fid`."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from dia_diffusion.data import SPLITS
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features.extractor import FeatureExtractor, check_features_name
from dia_diffusion.evaluation.frechet import LEVEL, MIN_RESAMPLES, SEED
from dia_diffusion.evaluation.metrics import DISTANCE, LAYERS, METRICS, Needs
from dia_diffusion.evaluation.record import EvaluationRecord
from dia_diffusion.io import sha256_of_json, shipped_folder, shipped_names
from dia_diffusion.pipelines.pipeline_uvit import check_guidance
from dia_diffusion.reading import read_yaml
from dia_diffusion.sampling.samplers import PRECISIONS, SamplingSettings, check_sampler_name
from dia_diffusion.validation import Float, NonNegative, Positive, Strict, validate

UNHASHED = ("name", "metrics", "kid_subset_size", "bootstrap", "held_out")
"""Fields that don't affect the distance."""


class EvalProtocol(Strict):
    """The requested measurement. Each record adds the reference images, hashes and versions."""

    name: str = ""
    """The file's stem; empty for a protocol from options."""
    features: Annotated[str, AfterValidator(check_features_name)]
    """The features that the distance is measured in: a row of FEATURES, or MODULE:CLASS."""
    num_samples: NonNegative
    """Number of images, 2 or more; a pipeline's seeds are 0, 1, 2, ... From options also 0: all images of a folder."""
    sampler: Annotated[str, AfterValidator(check_sampler_name)]
    """A name in SAMPLERS, or own."""
    steps: Positive
    """Sampler steps."""
    precision: Literal[*PRECISIONS] = "float32"  # type: ignore[valid-type]
    """Precision of the network, a name in PRECISIONS."""
    weights: Literal["ema"] = "ema"
    """Which weights of a run are sampled from; a run's pipelines hold no others."""
    reference_split: Literal[*SPLITS] | None = None  # type: ignore[valid-type]
    """train or test, for a reference that has splits; None leaves it open."""
    reference_count: Annotated[int, Field(ge=2)] | None = None
    """How many images the reference must have; None: any number."""
    classes: Annotated[list[NonNegative], Field(min_length=1)] | None = None
    """Classes for class-conditional models, assigned to the seeds in turn; None: all classes of a model."""
    guidance_scale: Annotated[Float, Field(ge=1)] = 1.0
    """Scale of classifier-free guidance, or of guidance by `guide`; 1 is none."""
    guidance_interval: list[Float] | None = None
    """Two noise levels: guidance applies where low < sigma / alpha <= high; None: everywhere."""
    guide: str | None = None
    """RUN, RUN:STEP or a pipeline folder, for autoguidance in place of the null label."""
    metrics: list[str] = Field(default_factory=lambda: [DISTANCE])
    """Rows of METRICS; the distance is always measured."""
    kid_subset_size: Annotated[int, Field(ge=2)] = 1000
    """Images per subset of KID."""
    bootstrap: NonNegative = 0
    """Resamples for the distance's interval; 0: no interval."""

    held_out: str | None = None
    """Real images outside the reference, for metric fdr; None: the other split of the reference."""

    @field_validator("num_samples")
    @classmethod
    def _check_num_samples(cls, count: int, info: ValidationInfo) -> int:
        if count < 2 and (count == 1 or info.data.get("name")):
            raise ValueError("2 or more")
        return count

    @field_validator("metrics")
    @classmethod
    def _check_metrics(cls, metrics: list[str]) -> list[str]:
        for name in metrics:
            METRICS.choose(name, "metrics")
        return list(dict.fromkeys([DISTANCE, *metrics]))

    @field_validator("bootstrap")
    @classmethod
    def _check_bootstrap(cls, resamples: int) -> int:
        if 0 < resamples < MIN_RESAMPLES:
            raise ValueError(f"{MIN_RESAMPLES} or more, or 0 for none")
        return resamples

    @model_validator(mode="after")
    def _check_guidance(self) -> "EvalProtocol":
        check_guidance(self.guidance_scale, self.guidance_interval, self.guide is not None)
        return self

    @classmethod
    def read(cls, name: str) -> "EvalProtocol":
        """A protocol from its file, by path or by the name of a shipped protocol.

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
        return validate(cls, {"name": path.stem, **values}, f"{path}: ")

    # Sampling and metrics.

    @property
    def sampling(self) -> SamplingSettings:
        """The settings that a pipeline is sampled with."""
        classes = None if self.classes is None else tuple(self.classes)
        return SamplingSettings(self.sampler, self.steps, classes, self.guidance_scale, self.guidance_interval)

    def needs(self, what: Needs) -> bool:
        """Whether one of the metrics needs it."""
        return bool(self.needing(what))

    def needing(self, what: Needs) -> list[str]:
        """The metrics that need it."""
        return [name for name in self.metrics if what in METRICS[name].needs]

    @property
    def layers(self) -> list[Needs]:
        """The extractor's layers that the metrics need in addition to the features."""
        return [layer for layer in LAYERS if self.needs(layer)]

    def metric_settings(self) -> dict[str, dict[str, Any]]:
        """Settings of metrics other than the distance that aren't in the resolved protocol, as stored in records."""
        settings = {name: self.settings_of(name) for name in self.metrics if name != DISTANCE}
        if self.bootstrap:
            settings["bootstrap"] = {"resamples": self.bootstrap, "level": LEVEL, "seed": SEED}
        return settings

    def settings_of(self, metric: str) -> dict[str, Any]:
        """The settings of one metric."""
        row = METRICS[metric]
        return {**row.settings, **{name: getattr(self, name) for name in row.options}}

    def metric_labels(self, features: str) -> list[str]:
        """The names in records of the metrics other than the distance, for these features and without deviations."""
        return [label for name in self.metrics if name != DISTANCE for label in METRICS[name].labels(features).values()]

    def check_count(self, count: int, *, reference: bool = False, num_features: int = 0) -> None:
        """Raises InputError if these images, or those of the reference, are too few for a metric.

        num_features: of the extractor; 0 checks only what doesn't depend on it.
        """
        for name in self.metrics:
            metric, what = METRICS[name], "reference images" if reference else "images"
            if not reference or "reference features" in metric.needs:
                metric.check_count(name, count, self.settings_of(name), what, num_features)

    def check_layers(self, extractor: FeatureExtractor) -> None:
        """Raises InputError if a metric needs logits or spatial features and the extractor has none."""
        for layer in self.layers:
            if layer not in extractor.widths:
                what = "logits" if layer == "logits" else "a spatial layer, as inception has,"
                asked = f"features must have {what} for metric {self.needing(layer)[0]}"
                raise InputError(f"{asked}, got {extractor.name}, which have none")

    # The name in records.

    def hash(self) -> str:
        """sha256 over the fields that affect the distance, without defaults, so that a new field changes no hash."""
        settings = {
            name: value
            for name, field in type(self).model_fields.items()
            if name not in UNHASHED and (value := getattr(self, name)) != field.default
        }
        return sha256_of_json(settings)

    def made(self, record: EvaluationRecord) -> bool:
        """Whether a record was made under this name and these settings."""
        return (record.protocol_name, record.protocol_file_hash) == (self.name, self.hash())

    def refuse_changed(self, records: Iterable[EvaluationRecord], place: str | Path) -> None:
        """Raises InputError if records in `place` have this protocol's name but were made with other settings."""
        for record in records:
            if record.protocol_name == self.name and not self.made(record):
                theirs, own = str(record.protocol_file_hash)[:8], self.hash()[:8]
                raise InputError(
                    f"{place} has records of a protocol {self.name} with other settings (hash {theirs}, now {own}); "
                    "give the changed protocol another name, or remove these records"
                )


def renamed(record: EvaluationRecord, protocol: EvalProtocol) -> EvaluationRecord:
    """The record under the protocol's name; unchanged if it has that name already, or the protocol has none."""
    if not protocol.name or protocol.made(record):
        return record
    return dataclasses.replace(record, protocol_name=protocol.name, protocol_file_hash=protocol.hash())
