"""Locks between processes: a lock file, and the lock of a folder."""

import os
import secrets
import socket
from pathlib import Path

from filelock import Timeout, UnixFileLock, has_fcntl

from dia_diffusion.errors import NOT_ON_WINDOWS, InputError

if not has_fcntl:
    raise ImportError(NOT_ON_WINDOWS)


def native_lock(path: Path) -> UnixFileLock:
    """A lock file: exclusive between processes and threads of a machine; the system releases it when its holder dies.

    The file remains when the lock is released. On a file system without locks `acquire` raises OSError.
    """
    return UnixFileLock(path, thread_local=False, fallback_to_soft=False)


class FolderLock:
    """The lock of a folder: a file `.lock` in it, which names the holder."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / ".lock"
        self._lock = native_lock(self.path)

    def acquire(self) -> None:
        """Locks the folder, which is created if missing, until `release` or the end of this process.

        Raises:
            InputError: another process holds the lock, or the folder can't be written or locked.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            self.path.write_text(
                f"process {os.getpid()} on {socket.gethostname()}\n{secrets.token_hex(16)}\n", encoding="utf-8"
            )
        except Timeout:
            holder = self.text().partition("\n")[0] or "another process"
            raise InputError(f"{self.folder} is in use by {holder}; stop it, or choose another output") from None
        except OSError as error:
            self.release()
            raise InputError(
                f"output must be a folder that can be written and locked, got {self.folder}: {error.strerror}"
            ) from None

    def release(self) -> None:
        """Releases the lock; does nothing if it is not held."""
        self._lock.release()

    def text(self) -> str:
        """The lock file's text, new each time the lock is acquired: processes that share the folder read the same."""
        try:
            return self.path.read_text(encoding="utf-8")
        except OSError:
            return ""

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
