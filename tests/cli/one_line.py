"""The format of every command's errors."""

import pytest

from dia_diffusion.cli.main import main


def error_of(arguments: list[object], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Runs a command that must fail with this exit code; its one line of error output."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    assert error.startswith("dia-diffusion ")
    return error
