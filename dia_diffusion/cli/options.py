"""A command's options from a typed model: argparse collects the text, pydantic checks it.

    class Options(Strict):
        source: Annotated[str, Positional("PIPELINE_OR_RUN")]
        \"""A pipeline folder, or a run folder.\"""
        batch_size: int = Field(64, ge=1)
        \"""Images per forward pass.\"""

    options = parse_options(Options, ["runs/a", "--batch-size", "32"], "sample")

A field is an option, its docstring the help. A bool is a flag, a tuple takes one or more arguments and may be repeated,
a list is text such as 0,1,2, a section's fields are `--section.key`. `options.model_fields_set` has the names of the
options that were given.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dia_diffusion.errors import InputError
from dia_diffusion.validation import describe_error, fields_of, model_in, nearest

Options = TypeVar("Options", bound=BaseModel)


class Metavar(str):
    """How the help shows an option's value: `Annotated[str, Metavar("DATA")]`."""


class Positional(Metavar):
    """The name of a positional argument: `Annotated[str, Positional("SOURCE")]`."""


class OptionParser(argparse.ArgumentParser):
    """An argument parser that raises InputError."""

    def error(self, message: str) -> NoReturn:
        what, _, names = message.partition(": ")
        name = names.split(", " if "required" in what else " ")[0]
        if what == "unrecognized arguments" and name.startswith("-"):
            known = [option for action in self._actions for option in action.option_strings]
            message = f"unknown option `{name}`; did you mean `{nearest(name, known)}`?"
        elif what == "the following arguments are required":
            message = f"`{name}` is missing"
        elif what.startswith("argument "):
            message = f"`{what.removeprefix('argument ')}` {names.replace('expected', 'needs')}"
        raise InputError(message)


def parse_options(model: type[Options], arguments: Sequence[str], command: str) -> Options:
    """The options of a command, checked; --help prints them and exits.

    Raises:
        InputError: an unknown option, or a value that the model refuses.
    """
    texts = vars(options_parser(model, command).parse_args(arguments))
    values: dict[str, Any] = {}
    for path, field in fields_of(model):
        if ".".join(path) in texts:
            section = values
            for name in path[:-1]:
                section = section.setdefault(name, {})
            section[path[-1]] = parse_text(texts[".".join(path)], field.annotation)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        names = {path: _metavar(field) for path, field in fields_of(model) if _is_positional(field)}
        raise InputError(describe_error(error, model, lambda path: names.get(tuple(path)) or flag(path))) from None


def program(command: str) -> str:
    """How a command, or a script that ends in .py, is named in help and error lines."""
    return command if command.endswith(".py") else f"dia-diffusion {command}"


def options_parser(model: type[BaseModel], command: str) -> OptionParser:
    """The parser of a model's options, described by its docstring; the values it collects are text."""
    parser = OptionParser(
        program(command),
        description=" ".join((model.__doc__ or "").split()),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for path, field in fields_of(model):
        if len(path) > 1 and path[0] not in groups:
            section = model_in(model.model_fields[path[0]].annotation)
            groups[path[0]] = parser.add_argument_group(path[0], section.__doc__ if section else None)
        kwargs: dict[str, Any] = {"help": _help(field)}
        if field.annotation is bool and len(path) == 1:
            kwargs["action"] = "store_true"
        else:
            kwargs["metavar"] = _metavar(field) or path[-1].upper()
            if get_origin(_without_none(field.annotation)) is tuple:
                kwargs |= {"nargs": "+", "action": "extend"}
        if _is_positional(field):
            parser.add_argument(".".join(path), **kwargs)
        else:
            group = groups[path[0]] if len(path) > 1 else parser
            group.add_argument(flag(path), dest=".".join(path), required=field.is_required(), **kwargs)
    return parser


def flag(path: Sequence[str]) -> str:
    """`--batch-size` for a field of the command, `--train.batch_size` for a field of a section."""
    return f"--{path[0].replace('_', '-')}" if len(path) == 1 else f"--{'.'.join(path)}"


def refuse_both(options: BaseModel, first: str, second: str) -> None:
    """Raises InputError if both options are given; for a model's validators."""
    if {first, second} <= options.model_fields_set:
        raise InputError(f"`{flag([second])}` must be left out when `{flag([first])}` is given")


def spell(options: BaseModel, name: str) -> str:
    """An option with its value as typed: `--classes 0,1`."""
    value = getattr(options, name)
    if isinstance(value, list | tuple):
        value = (" " if isinstance(value, tuple) else ",").join(map(str, value))
    return flag([name]) if value is True else f"{flag([name])} {value}"


def parse_text(text: Any, annotation: Any) -> Any:
    """Parses text for a field that isn't a plain string; returns it unchanged if that fails."""
    kind = _without_none(annotation)
    if get_origin(kind) is tuple:
        return tuple(parse_text(item, get_args(kind)[0]) for item in text)
    if not isinstance(text, str) or kind is str:
        return text
    if get_origin(kind) is list and not text.startswith("["):
        return [parse_text(item.strip(), get_args(kind)[0]) for item in text.split(",")]
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if str(choice) == text), text)
    try:
        return kind(text) if kind in (int, float, Path) else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text


def _without_none(annotation: Any) -> Any:
    """`X` of `X | None`."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    return parts[0] if type(None) in get_args(annotation) and len(parts) == 1 else annotation


def _metavar(field: FieldInfo) -> str | None:
    kind = _without_none(field.annotation)
    choices = f"{{{','.join(map(str, get_args(kind)))}}}" if get_origin(kind) is Literal else None
    return next((str(mark) for mark in field.metadata if isinstance(mark, Metavar)), choices)


def _is_positional(field: FieldInfo) -> bool:
    return any(isinstance(mark, Positional) for mark in field.metadata)


def _help(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True) if not field.is_required() else PydanticUndefined
    text = " ".join((field.description or "").split())
    if isinstance(default, tuple | list):
        default = (" " if isinstance(default, tuple) else ",").join(map(str, default))
    if default not in (PydanticUndefined, None, "") and default is not False:
        text += f" (default: {default})"
    return text.replace("%", "%%")
