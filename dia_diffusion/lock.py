"""A folder that one process at a time works in."""

import os
import secrets
import socket
from pathlib import Path
from typing import IO

from dia_diffusion.errors import NOT_ON_WINDOWS, InputError

try:
    import fcntl
except ModuleNotFoundError:
    raise ImportError(NOT_ON_WINDOWS) from None


def lock(file: IO[str] | int, *, wait: bool = False) -> None:
    """Locks an open file or folder for this process, until it is closed or the process ends.

    Raises:
        BlockingIOError: another process has locked it, and `wait` is False.
        OSError: a file system without locks.
    """
    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


class FolderLock:
    """The lock of a folder: its file `.lock`, which says who holds it, and which the system frees when they end."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / ".lock"
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Takes the folder, which is made if need be, for this process until it gives it back or ends.

        Raises:
            InputError: another process has it, or the folder can't be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise InputError(f"output {self.folder} can't be written: {error.strerror}") from None
        try:
            lock(file)
        except BlockingIOError:
            file.seek(0)
            owner = file.readline().strip() or "another process"
            raise InputError(f"{self.folder} is in use by {owner}; stop it, or choose another output") from None
        except OSError as error:
            raise InputError(f"output {self.folder} can't be locked on this disk: {error.strerror}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n{secrets.token_hex(16)}\n")
        file.flush()
        self._file = file

    def give_back(self) -> None:
        """Does nothing where it is not held."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def text(self) -> str:
        """What the lock holds, another at each time it is taken: processes that share the folder read the same."""
        try:
            return self.path.read_text(encoding="utf-8")
        except OSError:
            return ""

    def __enter__(self) -> "FolderLock":
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()
