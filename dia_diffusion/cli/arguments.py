"""What the commands' argument parsers have in common."""

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from dia_diffusion.errors import InputError


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are InputErrors, one line each, with the nearest option for an unknown one."""

    def __init__(self, command: str, description: str):
        super().__init__(
            prog=f"dia-diffusion {command}",
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").partition(" ")[0]
        if unknown.startswith("-") and "unrecognized" in message:
            known = [option for action in self._actions for option in action.option_strings]
            message += f"; did you mean {difflib.get_close_matches(unknown, known, n=1, cutoff=0.0)[0]}?"
        raise InputError(message)


def run_part(
    command: str,
    description: str,
    kind: str,
    parts: Mapping[str, Callable[[Sequence[str]], None]],
    arguments: Sequence[str],
) -> None:
    """Runs the part of a command that the first argument names with the other arguments.

    kind: what the parts are, such as "action"; each has its own options and help.
    """
    parser = CommandParser(command, description)
    parser.add_argument(kind, choices=parts, help=f"`dia-diffusion {command} {kind.upper()} --help` tells its options")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=f"of the {kind}")
    options = parser.parse_args(arguments)
    parts[getattr(options, kind)](options.arguments)
