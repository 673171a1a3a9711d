"""What every command's errors have in common."""

import pytest

from dia_diffusion.cli.main import main


def error_of(arguments: list[object], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    assert error.startswith("dia-diffusion ")
    return error
