"""`dia-diffusion fid`: Frechet distances to reference images; also under `accelerate launch eval/fid.py`.

Here are the options and what a protocol decides of them; `measuring` does the work.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from dia_diffusion.cli.options import Metavar, Positional, refuse_both, spell
from dia_diffusion.cli.shared_options import FeatureOptions, SamplingOptions, Split
from dia_diffusion.errors import InputError
from dia_diffusion.io import shipped_names

if TYPE_CHECKING:
    from dia_diffusion.evaluation.metrics import Extras
    from dia_diffusion.evaluation.protocol import EvalProtocol

DEFAULT_COUNT = 1000
"""Images of a pipeline."""


class Options(SamplingOptions, FeatureOptions):
    """Measures the Frechet distance of images to reference images."""

    source: Annotated[str, Positional("SOURCE")]
    """A pipeline, a run, or images: a folder, a zip, digits, ..."""
    reference: Annotated[str | None, Metavar("DATA")] = None
    """Images (a folder, a zip, a .npy or .npz file, a CIFAR archive, hf:NAME, digits, cifar10, cifar100), or a file of
    statistics; if not given, with --protocol, what a run was trained on."""
    protocol: Annotated[str | None, Metavar("NAME")] = Field(
        None,
        description=f"A YAML file, or one of {', '.join(shipped_names('protocols'))}: decides features, number of "
        "images, part of the reference, and how a pipeline is sampled; of images that are there already, the first "
        "three.",
    )
    reference_split: Split | None = None
    """Of the reference's images; train if not given."""
    split: Split | None = None
    """Of SOURCE, where it is images that have parts; train if not given."""
    size: int | None = None
    """Crop and resize images to this size; a pipeline's have their own."""
    channels: Literal[1, 3] = 3
    """Of images: 3, or 1 to measure them in gray."""
    num: int | None = Field(None, ge=2)
    """Images to measure; if not given, 1000 of a pipeline, all of a folder."""
    metrics: list[str] = Field(["fid"])
    """Of fid, kid, isc, prc; the distance is always measured."""
    kid_subset_size: int = 1000
    """Images per subset of KID."""
    bootstrap: int = 0
    """Resamples for the distance's 95 % interval; 0 for none."""
    step: int | None = None
    """Which of a run's pipelines; the newest if not given."""
    every_step: bool = False
    """All of a run's pipelines, one after the other."""
    record: Path | None = None
    """The file to add records to; if not given, evaluations.jsonl of the run, else here."""

    @model_validator(mode="after")
    def _check(self) -> "Options":
        refuse_both(self, "step", "every_step")
        return self


@dataclass(frozen=True)
class Request:
    """What is to be measured, checked."""

    options: Options
    """With what the protocol decides filled in."""
    protocol: "EvalProtocol | None"
    pipelines: list[Path]
    """In order of step; empty where the source is images."""
    reference: str
    extras: "Extras"

    def spell(self, name: str) -> str:
        """An option with its value for a message, and which protocol has decided it."""
        text = spell(self.options, name)
        if self.protocol is not None and name in _decided(self.protocol):
            text += f" of protocol {self.protocol.name}"
        return text

    def records_file(self, pipeline: Path | None) -> Path:
        """Where the records of a pipeline, or of images, are kept."""
        from dia_diffusion.pipelines.folder import EVALUATIONS, records_file

        return self.options.record or (Path(EVALUATIONS) if pipeline is None else records_file(pipeline))


def run(options: Options) -> None:
    """Measures what the options ask for and records it."""
    from dia_diffusion.cli.measuring import measure

    measure(resolve(options))


def resolve(options: Options) -> Request:
    """The request of the options; refuses what can't be measured before anything is computed."""
    from dia_diffusion.evaluation.metrics import Extras
    from dia_diffusion.evaluation.protocol import EvalProtocol

    source = Path(options.source)
    is_model = any((source / name).exists() for name in ("pipelines", "model_index.json", "config.yaml"))
    _refuse_ignored(options, is_model)
    if options.reference is None and not (options.protocol is not None and is_model):
        raise InputError("`--reference` is missing; only a run or its pipeline with --protocol needs none")
    protocol = None if options.protocol is None else EvalProtocol.read(options.protocol)
    if protocol is not None:
        options = _fill_in(options, protocol, is_model)
    if options.record is not None:
        check_record_file(options.record)
    pipelines = _pipelines(options) if is_model else []
    reference = options.reference or _training_images(pipelines[-1])
    extras = Extras(tuple(options.metrics), options.kid_subset_size, options.bootstrap)
    request = Request(options, protocol, pipelines, reference, extras)
    if protocol is not None:
        _check_against(protocol, request)
    return request


def _refuse_ignored(options: Options, is_model: bool) -> None:
    """Raises InputError for an option that has no effect on this kind of source."""
    why = "draws images of its own" if is_model else "is no pipeline and no run"
    ignored = ("size", "channels", "split") if is_model else (*SamplingOptions.model_fields, "step", "every_step")
    for name in ignored:
        if getattr(options, name) != Options.model_fields[name].default:
            raise InputError(f"{spell(options, name)}: {options.source} {why}; leave it out")


def _fill_in(options: Options, protocol: "EvalProtocol", is_model: bool) -> Options:
    """The options with what the protocol decides; raises InputError for one of these that is given too."""
    decided = {
        name: value
        for name, value in _decided(protocol).items()
        if is_model or name not in SamplingOptions.model_fields
    }
    filled = options.model_copy(update=decided)
    if given := next((name for name in decided if name in options.model_fields_set), None):
        says = "all" if decided[given] is None else spell(filled, given).partition(" ")[2]
        raise InputError(
            f"{spell(options, given)}: protocol {protocol.name} says {says}; leave it out, or leave out --protocol"
        )
    return filled


def _decided(protocol: "EvalProtocol") -> dict[str, Any]:
    """Option -> the protocol's value."""
    decided = {
        "features": protocol.features,
        "num": protocol.num_samples,
        "sampler": protocol.sampler,
        "steps": protocol.steps,
        "precision": protocol.precision,
        "classes": None if protocol.classes is None else list(protocol.classes),
        "guidance_scale": protocol.guidance_scale,
    }
    return decided if protocol.reference_split is None else {**decided, "reference_split": protocol.reference_split}


def _pipelines(options: Options) -> list[Path]:
    """The folders of the pipelines to measure, in order of step."""
    from dia_diffusion.io import step_folders
    from dia_diffusion.pipelines.folder import find_pipeline
    from dia_diffusion.training.run_folder import RunFolder

    if options.every_step and (folders := step_folders(RunFolder(options.source).pipelines)):
        return list(folders.values())
    return [find_pipeline(options.source, options.step)]


def _training_images(pipeline: Path) -> str:
    """The images that a pipeline's run was trained on, as its recipe names them."""
    from dia_diffusion.data.sources import find_format
    from dia_diffusion.pipelines.folder import read_training

    training = read_training(pipeline)
    if training is None:
        raise InputError(f"{pipeline} doesn't say what it was trained on; give --reference DATA")
    source = str(training["recipe"]["data"].get("source"))
    if find_format(source) is None and not Path(source).exists():
        raise InputError(f"{pipeline} was trained on {source}, which isn't here; give --reference DATA")
    return source


def check_record_file(file: Path) -> None:
    """Raises InputError for what no record could be added to, before anything is measured."""
    place = next(path for path in (file, *file.absolute().parents) if path.exists())
    if file.is_dir() or not (place == file or place.is_dir()) or not os.access(place, os.W_OK):
        raise InputError(f"`--record` must be a file in a writable folder, got {file}, which can't be written")


def _check_against(protocol: "EvalProtocol", request: Request) -> None:
    """Raises InputError for pipelines of other weights, and for records of this protocol with other settings."""
    from dia_diffusion.evaluation.record import read_records
    from dia_diffusion.pipelines.folder import read_training

    for pipeline in request.pipelines:
        weights = (read_training(pipeline) or {}).get("weights", protocol.weights)  # others' don't say which they are
        if weights != protocol.weights:
            measured = f"protocol {protocol.name} measures {protocol.weights}"
            raise InputError(f"{pipeline} holds {weights} weights; {measured}")
    files = map(request.records_file, request.pipelines) if request.pipelines else [request.records_file(None)]
    for file in dict.fromkeys(files):
        if file.is_file():
            protocol.refuse_changed(read_records(file), file)
