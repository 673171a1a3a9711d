"""What the commands' argument parsers have in common."""

import argparse
import difflib
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
