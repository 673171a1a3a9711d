"""How a command ends other than well, the exit code of each, and text that fits its one line."""

import re
import signal

NOT_ON_WINDOWS = "dia-diffusion needs Linux or macOS; on Windows, run it in WSL (the Windows Subsystem for Linux)"
LONGEST = 2000
# What an address may carry besides its place: a name with a password, or a token among its parameters.
USER = re.compile(r"(\b[a-z][a-z0-9+.-]+:/{1,2})[^/@\s]+@", re.IGNORECASE)  # a path has but one stroke
PARAMETER = re.compile(r"([?&][\w-]*(?:token|key|password|secret|signature)[\w-]*=)[^&\s'\"]+", re.IGNORECASE)


def one_line(text: str) -> str:
    """Text from outside, fit for a one-line message: no control characters, of a bounded length."""
    text = " ".join(text.split())
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 300 else text[:300] + "..."


def printable(text: str) -> str:
    """Text that a terminal only shows: what it would obey is written out, as '\\x1b', and no address tells secrets."""
    text = PARAMETER.sub(r"\1***", USER.sub(r"\1***@", text))
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: Exception) -> str:
    """What another library's error says, which goes on for many lines at times; its type where it says nothing."""
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0])


class InputError(ValueError):
    """What was given can't be used: a recipe, a dataset, a checkpoint, an argument. Exit code 2.

    The message is one line that names the value and what is accepted instead.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))  # which quotes names and values that anybody may have chosen

    alone = False
    """Whether the other processes don't meet it, so that this one has to tell it."""


class RunError(RuntimeError):
    """Something failed while running, with valid input: a non-finite loss, no disk space. Exit code 1."""

    told = False  # whether another process tells it

    def __init__(self, message: str):
        super().__init__(printable(message))


class DivergedError(RunError):
    """A training's loss or gradient was not finite."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step
        """The first such step, counted from 1."""


class Stopped(Exception):
    """A signal ended the work at a place it can go on from. Exit code 128 + signal."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends what Ctrl-C ends and in the same way."""


def number_of(interrupt: KeyboardInterrupt) -> int:
    """The signal that an interrupt stands for."""
    return signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT
