"""Runs scripts of tools/ in this process."""

from collections.abc import Callable
from typing import Any

import pytest

from dia_diffusion.cli.main import run_script
from dia_diffusion.validation import Strict


def script_error(
    name: str,
    options: type[Strict],
    run: Callable[[Any], None],
    arguments: list[object],
    capsys: pytest.CaptureFixture[str],
) -> str:
    """The one-line error of a script that ends with exit code 2."""
    capsys.readouterr()
    assert run_script(name, options, run, [str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"{name}: error: "), error
    return error
