"""Output that can't be written: to a pipe without a reader, such as `| head` that has ended, and to a full disk."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import TextIO

import pytest

from dia_diffusion.cli import params
from dia_diffusion.cli.main import COMMANDS, main
from tests.cli.one_line import error_of

ENDED_BY_SIGPIPE = 141


@pytest.fixture
def closed_pipe() -> Iterator[TextIO]:
    """The write end of a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    yield stream
    stream.close()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["params", "--model", "S/2"], *([name, "--help"] for name in COMMANDS)]
)
def test_without_a_reader_a_command_ends_quietly(
    arguments: list[str], closed_pipe: TextIO, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    assert main(arguments) == ENDED_BY_SIGPIPE
    assert capsys.readouterr().err == ""


def test_nothing_is_said_as_the_interpreter_ends(closed_pipe: TextIO) -> None:
    program = "import sys, dia_diffusion_command; sys.exit(dia_diffusion_command.main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "train", "--help"]
    ended = subprocess.run(command, stdout=closed_pipe, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (ENDED_BY_SIGPIPE, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which is Linux'")
def test_a_full_disk_behind_stdout_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["env", "--help"]) == 1
        assert capsys.readouterr().err == "dia-diffusion env: failed to write output: No space left on device\n"


def test_a_closed_stdout_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it after `>&-`
    assert main(["--version"]) == 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BrokenPipeError(32, "Broken pipe"), "failed to write output: Broken pipe"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] writev: Broken pipe"), "another process of this launch"),
    ],
)
def test_another_broken_pipe_is_reported(
    error: Exception, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise error

    monkeypatch.setattr(params, "run", broken)
    assert expected in error_of(["params"], capsys, code=1)
