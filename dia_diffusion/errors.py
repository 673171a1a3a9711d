"""The errors that end a command, their exit codes, and one-line messages."""

import re
import signal

NOT_ON_WINDOWS = "dia-diffusion needs Linux or macOS; on Windows, run it in WSL (the Windows Subsystem for Linux)"
LONGEST = 2000
# Secrets in a URL: a user name with a password, or a token among the parameters.
USER = re.compile(r"(\b[a-z][a-z0-9+.-]+:/{1,2})[^/@\s]+@", re.IGNORECASE)  # a path has only one slash
PARAMETER = re.compile(r"([?&][\w-]*(?:token|key|password|secret|signature)[\w-]*=)[^&\s'\"]+", re.IGNORECASE)


def one_line(text: str) -> str:
    """Untrusted text for a one-line message: no control characters, at most 300 characters."""
    text = " ".join(text.split())
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 300 else text[:300] + "..."


def printable(text: str) -> str:
    """Text that is safe for a terminal: control characters are escaped, as '\\x1b', and secrets in URLs are masked."""
    text = PARAMETER.sub(r"\1***", USER.sub(r"\1***@", text))
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: Exception) -> str:
    """The first line of another library's error; its type if it has no text."""
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0])


class InputError(ValueError):
    """Unusable input: a recipe, a dataset, a checkpoint, an argument. Exit code 2.

    The message is one line: "`X` must be Z, got Y".
    """

    def __init__(self, message: str):
        super().__init__(printable(message))  # the message quotes untrusted names and values

    alone = False
    """Whether only this rank raises it, and therefore has to report it."""


class RunError(RuntimeError):
    """A failure at run time with valid input: a non-finite loss, a full disk. Exit code 1."""

    reported = False  # whether another rank reports it

    def __init__(self, message: str):
        super().__init__(printable(message))


class DivergedError(RunError):
    """The loss or gradient of a training was not finite."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step
        """The first non-finite step, counted from 1."""


class Stopped(Exception):
    """A signal stopped the work where it can be resumed. Exit code 128 + signal."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


def number_of(interrupt: KeyboardInterrupt) -> int:
    """The signal that an interrupt stands for."""
    return signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT
