"""Files and folders that appear whole or not at all, checksummed lines of JSON, and a folder's lock."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from dia_diffusion.errors import NOT_ON_WINDOWS, InputError

KEY = "crc32"


def with_checksum(value: dict[str, Any]) -> dict[str, Any]:
    """The object with its checksum, which is its last item."""
    return {**value, KEY: _checksum(json.loads(json.dumps(value)))}  # as it will be read: tuples are lists then


def verify_checksum(value: Any) -> dict[str, Any]:
    """The object without its checksum; one that was written without, as by an older version, is taken as it is.

    Raises:
        ValueError: it was altered since, or is no object.
    """
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    *items, (_, checksum) = [*value.items()] or [("", "")]
    rest = dict(items)
    if checksum == _checksum(rest):  # whatever its key, which may have had the flipped bit
        return rest
    if KEY in value:
        raise ValueError("its checksum differs")
    return value


def _checksum(value: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


STEP_FOLDER = re.compile(r"step-(\d{8,})")
PARTIAL = ".partial"
REPLACED = re.compile(r"\.(.+)\.replaced\.")  # how `atomic_dir` names what it sets aside


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there takes `path`'s place when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        with naming(path):
            yield temporary
            temporary.chmod(_usual_mode())
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
    finally:
        with suppress(OSError):  # mostly because it has its name by now
            temporary.unlink()


@contextmanager
def atomic_dir(path: str | Path, replace: bool = True, needed: int = 0) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which takes that name when the block ends well.

    A folder that is already at `path` is replaced, and only once the new one is complete. With replace False whatever
    is there stays, as what another process puts there meanwhile, and InputError is raised. `needed` bytes, where they
    are known before, are looked for first.
    """
    path = Path(path)
    if not replace:
        refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = _beside(path), _beside(path.with_name(f"{path.name}.replaced"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with naming(path, needed):
            if needed > shutil.disk_usage(path.parent).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    file.chmod(_usual_mode())
                _flush(file)
            _flush(temporary)
            if not replace:
                refuse_existing(path)
            elif path.exists():
                os.rename(path, replaced)  # removing it first would leave neither for as long as that takes
            os.rename(temporary, path)
            _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():  # an error between the two renames
            os.rename(replaced, path)
        shutil.rmtree(replaced, ignore_errors=True)


def refuse_existing(path: Path) -> None:
    """Raises InputError where anything is at `path`, be it a broken link."""
    if os.path.lexists(path):
        raise InputError(f"{path} exists; choose another name, or remove it")


def remove_partial(folder: Path) -> None:
    """Removes what processes that were killed while writing have left in a folder.

    A folder that one of them had set aside, and put no other in its place, is put back. What a process of this machine
    writes that is still there is left alone.
    """
    for path in folder.glob(f".*{PARTIAL}"):
        written, _, process = path.name.removesuffix(PARTIAL).rpartition(".")  # as `_beside` names them
        if not process.isdecimal() or (written.endswith(f".{socket.gethostname()}") and _runs(int(process))):
            continue
        replaced = REPLACED.match(path.name)
        if replaced and not (folder / replaced[1]).exists():
            os.rename(path, folder / replaced[1])
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Whether another process of this machine has this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return process != os.getpid()


_IN_CHECKOUT = {"recipes": "train/configs", "curves": "eval/curves", "protocols": "eval/protocols"}


def shipped_folder(kind: str) -> Path:
    """The shipped recipes, curves (studies) or protocols: in an installed package beside the code, or in a checkout."""
    package = Path(__file__).parent
    return package / kind if (package / kind).is_dir() else package.parent / _IN_CHECKOUT[kind]


def shipped_names(kind: str) -> list[str]:
    """The names of the shipped recipes, curves or protocols."""
    return sorted(path.stem for path in shipped_folder(kind).glob("*.yaml"))


def step_name(step: int) -> str:
    """The name of a step's checkpoint and pipeline folder."""
    return f"step-{step:08d}"


def step_folders(folder: Path) -> dict[int, Path]:
    """step -> folder, in rising order, for the finished step folders in `folder`."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = STEP_FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def write_text(path: str | Path, text: str) -> None:
    """Writes a whole text file."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Writes a whole JSON file, indented for a reader."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def append_json_line(path: str | Path, value: dict[str, Any]) -> None:
    """Appends a line of JSON with its checksum, flushed to the disk; after a truncated line it starts a new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line_to_add = json.dumps(with_checksum(value)).encode() + b"\n"
    with naming(path, len(line_to_add)), path.open("ab+", buffering=0) as file:
        end = file.tell()
        torn = False
        if end:
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        line = (b"\n" if torn else b"") + line_to_add
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


@contextmanager
def naming(path: Path, needed: int = 0) -> Iterator[None]:
    """Makes an OSError name the path meant, not a temporary one, and a full disk say what is free.

    needed: the bytes to be written, where they are known before.
    """
    try:
        yield
    except SafetensorError as error:  # which it raises for a full disk too
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise _full(errno.ENOSPC, path, needed) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            if str(error.filename).endswith(PARTIAL):
                error.filename = str(path)
            raise
        raise _full(error.errno, path, needed) from None


def _full(number: int, path: Path, needed: int) -> OSError:
    takes = f"it takes {_size(needed)}, and " if needed else ""
    free = _size(shutil.disk_usage(path.parent).free)
    return OSError(number, f"{os.strerror(number)} ({takes}{free} are free)", str(path))


def _size(count: float) -> str:
    """As "4.2 MB"."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:,.1f} GB"


def sha256_of_file(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where derived files that can be made again are kept: $DIA_DIFFUSION_CACHE, else ~/.cache/dia-diffusion."""
    return Path(os.environ.get("DIA_DIFFUSION_CACHE") or Path.home() / ".cache" / "dia-diffusion")


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{PARTIAL}")


def _usual_mode() -> int:
    """The mode of a newly created file; safetensors' own writer leaves files that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
