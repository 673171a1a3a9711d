"""`fid --protocol NAME`: the options that it decides, the reference of a run that is given none, what it refuses."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.sampling_options import SAMPLING
from dia_diffusion.data.sources import find_format
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.protocols import NamedProtocol, protocol_names, read_protocol, refuse_changed
from dia_diffusion.evaluation.record import read_records
from dia_diffusion.pipelines.folder import read_training

_NOT_GIVEN = object()


def add_protocol_option(parser: CommandParser) -> None:
    """--protocol, which `parse_with_protocol` reads."""
    parser.add_argument(
        "--protocol",
        metavar="NAME",
        help=f"a YAML file, or one of {', '.join(protocol_names())}: decides features, number of images, part of the "
        "reference, and how a pipeline is sampled; of images that are there already, the first three",
    )


def parse_with_protocol(parser: CommandParser, arguments: Sequence[str], drawn: bool) -> argparse.Namespace:
    """The options with what --protocol decides filled in; their `protocol` is the NamedProtocol.

    Args:
        parser: with --protocol among its options.
        arguments: of the command line, with that option given.
        drawn: whether the source draws images, so that there is something to decide of sampling.

    Raises:
        InputError: no such protocol, or an option beside it that it decides.
    """
    protocol = read_protocol(parser.parse_args(arguments).protocol)
    decided = {name: value for name, value in _decided(protocol).items() if drawn or name not in SAMPLING}
    options = parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(decided, _NOT_GIVEN)))
    for name, value in decided.items():
        if (given := getattr(options, name)) is not _NOT_GIVEN:
            told = f"protocol {protocol.name} says {'all' if value is None else value}"
            raise InputError(f"{_flag(name)} {given}: {told}; leave it out, or leave out --protocol")
        setattr(options, name, value)
    options.protocol = protocol
    return options


def option_told(options: argparse.Namespace, name: str) -> str:
    """An option with its value as a message tells it, and whose it is where a protocol has decided it."""
    text = f"{_flag(name)} {getattr(options, name)}"
    if options.protocol is not None and name in _decided(options.protocol):
        text += f" of protocol {options.protocol.name}"
    return text


def reference_of_training(folder: Path) -> str:
    """The images that a pipeline's run was trained on, as its recipe names them.

    Raises:
        InputError: the folder doesn't say, or they aren't there.
    """
    training = read_training(folder)
    if training is None:
        raise InputError(f"{folder} doesn't say what it was trained on; give the reference by --reference DATA")
    source = str(training["recipe"]["data"].get("source"))
    if find_format(source) is None and not Path(source).exists():
        raise InputError(f"{folder} was trained on {source}, which isn't here; give the reference by --reference DATA")
    return source


def check_count(options: argparse.Namespace, count: int | None) -> None:
    """Raises InputError unless the reference has as many images as the protocol says, where it says."""
    expected = None if options.protocol is None else options.protocol.reference_count
    if expected is not None and count != expected:
        told = "doesn't say how many images it has" if count is None else f"has {count:,} images"
        raise InputError(
            f"--reference {options.reference} {told}; protocol {options.protocol.name} measures against {expected:,}"
        )


def check_pipelines(protocol: NamedProtocol, folders: Iterable[Path]) -> None:
    """Raises InputError for a pipeline of other weights than the protocol's; others' don't say which they are."""
    for folder in folders:
        weights = (read_training(folder) or {}).get("weights", protocol.weights)
        if weights != protocol.weights:
            raise InputError(f"{folder} holds {weights} weights; protocol {protocol.name} measures {protocol.weights}")


def check_records(protocol: NamedProtocol, files: Iterable[Path]) -> None:
    """Raises InputError where a file of records, if it is there, has some of the protocol with other settings."""
    for file in dict.fromkeys(files):
        if file.is_file():
            refuse_changed(read_records(file), protocol, file)


def check_features(options: argparse.Namespace, features: str) -> None:
    """Raises InputError for Inception's features of other weights than a protocol that measures in them means."""
    if options.protocol is not None and features != options.protocol.features:
        raise InputError(
            f"--inception-weights {options.inception_weights} give features {features}; protocol "
            f"{options.protocol.name} measures in {options.protocol.features}"
        )


def _decided(protocol: NamedProtocol) -> dict[str, Any]:
    """Option, by the name that it has once parsed -> the protocol's value."""
    decided = {
        "features": protocol.features,
        "num": protocol.num_samples,
        "sampler": protocol.sampler,
        "steps": protocol.steps,
        "precision": protocol.precision,
        "classes": None if protocol.classes is None else ",".join(map(str, protocol.classes)),
        "guidance_scale": protocol.guidance_scale,
    }
    return decided if protocol.reference_split is None else {**decided, "reference_split": protocol.reference_split}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
