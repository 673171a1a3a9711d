"""The options of `dia-diffusion fid`, and the protocol that they name or define."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from dia_diffusion.cli.options import Metavar, Positional, flag, refuse_both, spell
from dia_diffusion.cli.shared_options import (
    FeatureOptions,
    SamplingOptions,
    Split,
    chosen_precision,
    features_for,
)
from dia_diffusion.errors import InputError
from dia_diffusion.io import shipped_names
from dia_diffusion.validation import describe_error

if TYPE_CHECKING:
    from dia_diffusion.evaluation.protocol import EvalProtocol


Asked = TypeVar("Asked", bound="MeasureOptions")
DEFAULT_COUNT = 1000
"""Images measured from a pipeline."""
OPTION_OF = {"num_samples": "num"}
"""Field of EvalProtocol -> the option, if the names differ."""
DECIDED = (
    *("features", "num_samples", "sampler", "steps", "precision", "classes"),
    *("guidance_scale", "guidance_interval", "guide", "reference_split"),
)
"""Fields that a named protocol decides."""
EXTRA = ("metrics", "kid_subset_size", "bootstrap", "held_out")
"""Fields that options may change in a named protocol."""


class MeasureOptions(SamplingOptions, FeatureOptions):
    """The options that `measure` uses, for every command."""

    reference: Annotated[str | None, Metavar("DATA")] = None
    """Images (a folder, a zip, a .npy or .npz file, a CIFAR archive, hf:NAME, digits, cifar10, cifar100), or a file of
    statistics; if not given, with --protocol, the run's training images."""
    protocol: Annotated[str | None, Metavar("NAME")] = Field(
        None,
        description=f"A YAML file, or one of {', '.join(shipped_names('protocols'))}: sets the features, the number "
        "of images, the reference split and, for a pipeline, how it is sampled.",
    )
    reference_split: Split | None = None
    """Split of the reference images; train if not given."""
    num: int | None = Field(None, ge=2)
    """Number of images to measure; if not given, 1000 from a pipeline, all of a folder."""
    metrics: list[str] = Field(["fid"])
    """Any of fid, sfid, kid, isc, prc, dc, mind, fd-inf, fdr, isc-adm, prc-adm; the distance is always measured."""
    kid_subset_size: int = 1000
    """Images per subset of KID."""
    held_out: Annotated[str | None, Metavar("DATA")] = None
    """Real images outside the reference, for fdr; if not given, the reference's other split."""
    bootstrap: int = 0
    """Resamples for the distance's 95 % interval; 0 for none."""
    show: int = Field(0, ge=0)
    """Write an HTML page with this many samples beside their nearest reference images, and the best and worst."""
    record: Path | None = None
    """The file to add records to; if not given, evaluations.jsonl of the run, or in the current folder."""


class Options(MeasureOptions):
    """Measures the Frechet distance of images to reference images."""

    source: Annotated[str, Positional("SOURCE")]
    """A pipeline, a run, or images: a folder, a zip, digits, ..."""
    split: Split | None = None
    """Split of SOURCE, for images with splits; train if not given."""
    size: int | None = None
    """Crop and resize images to this size; not for pipelines."""
    channels: Literal[1, 3] = 3
    """Channels of images: 3, or 1 to measure them in gray; not for pipelines."""
    step: int | None = None
    """Step of a run's pipeline; the newest if not given."""
    every_step: bool = False
    """All of a run's pipelines, one after the other."""
    sweep: Annotated[tuple[str, ...], Metavar("KEY=VALUE,VALUE")] = ()
    """Measure a grid of values, such as guidance_scale=1,1.5,2 steps=10,25. KEY: sampler, steps, guidance_scale,
    guidance_interval (none,0.3:5), guide, precision, step, width or decay; the last two are averages as made by ema."""

    @model_validator(mode="after")
    def _check(self) -> "Options":
        refuse_both(self, "step", "every_step")
        refuse_both(self, "sweep", "every_step")
        refuse_both(self, "sweep", "show")
        return self


def with_precision(options: Asked) -> Asked:
    """The options with precision `auto` resolved for the device, unless a protocol decides."""
    if options.protocol is not None or options.precision != "auto":
        return options
    return options.model_copy(update={"precision": chosen_precision(options.precision)})


def per_features(options: MeasureOptions) -> list[MeasureOptions]:
    """One copy of the options for each name in `features`."""
    names = list(dict.fromkeys((options.features or "").split(",")))
    if len(names) > 1 and options.weights_file is not None:
        raise InputError(
            f"`--features` must be one name with `--weights` or `--inception-weights`, got {options.features}"
        )
    return [options.model_copy(update={"features": name}) if name else options for name in names]


def resolve_protocol(
    options: MeasureOptions, is_model: bool, reference: str, settings: Mapping[str, Any] | None = None
) -> "EvalProtocol":
    """The protocol that the options name or define. Raises InputError for options that are invalid.

    settings: replace fields of the protocol; those that differ from a named protocol are added to its name.
    """
    from dia_diffusion.evaluation.protocol import EvalProtocol

    values: dict[str, Any] = {}
    settings = dict(settings or {})
    if options.protocol is not None:
        named = EvalProtocol.read(options.protocol)
        _refuse_decided(options, named, is_model)
        extra = {name: getattr(options, name) for name in EXTRA if name in options.model_fields_set}
        values = named.model_dump() | extra
        if changed := [name for name, value in settings.items() if value != values[name]]:
            values["name"] += " with " + ", ".join(f"{name}={settings[name]}" for name in changed)
    else:
        values = {field: getattr(options, OPTION_OF.get(field, field)) for field in (*DECIDED, *EXTRA)}
        values["features"] = options.features or features_for(reference)
        values["num_samples"] = options.num or (DEFAULT_COUNT if is_model else 0)
    try:
        protocol = EvalProtocol.model_validate(values | settings)
    except ValidationError as error:
        raise InputError(describe_error(error, EvalProtocol, _flag)) from None
    for option, metric in (("kid_subset_size", "kid"), ("held_out", "fdr")):
        if option in options.model_fields_set and metric not in protocol.metrics:
            raise InputError(f"`{flag([option])}` must be left out without metric {metric}")
    return protocol


def _flag(field: Sequence[str]) -> str:
    return flag([OPTION_OF.get(field[0], field[0])])


def refuse_ignored(options: Options, is_model: bool) -> None:
    """Raises InputError for an option that has no effect on this kind of source."""
    why = "generates its own images" if is_model else "is neither a pipeline nor a run"
    ignored = (
        ("size", "channels", "split") if is_model else (*SamplingOptions.model_fields, "step", "every_step", "sweep")
    )
    for name in ignored:
        if getattr(options, name) != Options.model_fields[name].default:
            raise InputError(f"{spell(options, name)}: {options.source} {why}; leave it out")
    if options.reference is None and not (options.protocol is not None and is_model):
        raise InputError("`--reference` is missing; only a run or its pipeline with --protocol needs none")


def _refuse_decided(options: MeasureOptions, protocol: "EvalProtocol", is_model: bool) -> None:
    """Raises InputError for an option that a named protocol decides."""
    for field in DECIDED:
        option, value = OPTION_OF.get(field, field), getattr(protocol, field)
        applies = is_model or option not in SamplingOptions.model_fields
        is_open = field == "reference_split" and value is None
        if option in options.model_fields_set and applies and not is_open:
            says = ",".join(map(str, value)) if isinstance(value, list) else value
            if value is None:
                says = "all" if field == "classes" else "none"
            raise InputError(
                f"{spell(options, option)}: protocol {protocol.name} says {says}; leave it out, or leave out --protocol"
            )


def check_features(options: FeatureOptions, protocol: "EvalProtocol", features: str) -> None:
    """Raises InputError if the features aren't those of the named protocol, such as Inception with other weights."""
    if protocol.name and features != protocol.features:
        raise InputError(
            f"`--weights` must give features {protocol.features} for protocol {protocol.name}, got "
            f"{options.weights_file}, which give {features}"
        )


def spelled(protocol: "EvalProtocol", field: str) -> str:
    """How messages name a field of the protocol."""
    named = f"`{field}` of protocol {protocol.name}"
    return named if protocol.name else f"`{_flag([field])}`"
