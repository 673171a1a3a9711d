"""Atomic writes of files and folders, and JSON with a checksum."""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dia_diffusion.errors import InputError

KEY = "crc32"


def with_checksum(value: dict[str, Any]) -> dict[str, Any]:
    """The object with its checksum as the last item."""
    return {**value, KEY: _checksum(json.loads(json.dumps(value)))}  # as it will be read: tuples become lists


def verify_checksum(value: Any) -> dict[str, Any]:
    """The object without its checksum. An object without one, as older versions wrote, is returned unchanged.

    Raises:
        ValueError: it is corrupted, or not an object.
    """
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    *items, (_, checksum) = [*value.items()] or [("", "")]
    rest = dict(items)
    if checksum == _checksum(rest):  # whatever its key is, since the flipped bit may be in the key
        return rest
    if KEY in value:
        raise ValueError("its checksum differs")
    return value


def _checksum(value: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


STEP_FOLDER = re.compile(r"step-(\d{8,})")
PARTIAL = ".partial"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
REPLACED = re.compile(r"\.(.+)\.replaced\.")  # the name of a folder that `atomic_dir` replaces


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`, which is flushed and renamed to `path` if the block succeeds."""
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
        with suppress(OSError):  # it was renamed, or never written
            temporary.unlink()


@contextmanager
def atomic_dir(path: str | Path, replace: bool = True, needed: int = 0) -> Iterator[Path]:
    """Yields a temporary folder next to `path`, which is flushed and renamed to `path` if the block succeeds.

    Args:
        replace: replace a folder at `path` once the new one is complete; False raises InputError if anything is there,
            even if it was put there while the block ran.
        needed: bytes to be written, if known; checked against the free space first.
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
                os.rename(path, replaced)  # removing it takes long, and meanwhile neither folder would be in place
            os.rename(temporary, path)
            _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():  # an error between the two renames
            os.rename(replaced, path)
        shutil.rmtree(replaced, ignore_errors=True)


def check_writable(file: Path, name: str) -> None:
    """Raises InputError, naming the option or the file's purpose, if the file can't be written or extended."""
    place = next(path for path in (file, *file.absolute().parents) if path.exists())
    if file.is_dir() or not (place == file or place.is_dir()) or not os.access(place, os.W_OK):
        raise InputError(f"{name} must be a file that can be written, got {file}")


def refuse_existing(path: Path) -> None:
    """Raises InputError if anything is at `path`, even a broken link."""
    if os.path.lexists(path):
        raise InputError(f"{path} exists; choose another name, or remove it")


def remove_partial(folder: Path) -> None:
    """Removes the temporary files that killed processes left in a folder.

    A folder that was being replaced is put back if the new one is missing. Files of processes that still run on this
    machine are kept.
    """
    for path in folder.glob(f".*{PARTIAL}"):
        written, _, process = path.name.removesuffix(PARTIAL).rpartition(".")  # the names that `_beside` gives
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
    """Whether another process on this machine has this id."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's process
        return True
    return process != os.getpid()


_IN_CHECKOUT = {"recipes": "train/configs", "curves": "eval/curves", "protocols": "eval/protocols"}


def shipped_folder(kind: str) -> Path:
    """The folder of shipped recipes, curves (studies) or protocols: next to the installed code, or in a checkout."""
    package = Path(__file__).parent
    return package / kind if (package / kind).is_dir() else package.parent / _IN_CHECKOUT[kind]


def shipped_names(kind: str) -> list[str]:
    """The names of the shipped recipes, curves or protocols."""
    return sorted(path.stem for path in shipped_folder(kind).glob("*.yaml"))


def step_name(step: int) -> str:
    """The name of a step's checkpoint and pipeline folder."""
    return f"step-{step:08d}"


def step_folders(folder: Path) -> dict[int, Path]:
    """step -> path of each complete step folder in `folder`, in ascending order."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = STEP_FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Writes an indented JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def append_json_line(path: str | Path, value: dict[str, Any]) -> None:
    """Appends a line of JSON with its checksum and flushes it to disk; starts a new line after a truncated one."""
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
    """Makes an OSError name `path` instead of a temporary file, and adds the free space to "disk full".

    Args:
        needed: bytes to be written, if known.
    """
    try:
        yield
    except SafetensorError as error:  # what safetensors raises in place of an OSError
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        number = int(found[1])
        if number in NO_SPACE:
            raise _full(number, path, needed) from None
        raise OSError(number, os.strerror(number), str(path)) from None
    except OSError as error:
        if error.errno not in NO_SPACE:
            if str(error.filename).endswith(PARTIAL):
                error.filename = str(path)
            raise
        raise _full(error.errno, path, needed) from None


def _full(number: int, path: Path, needed: int) -> OSError:
    takes = f"it takes {_size(needed)}, and " if needed else ""
    free = _size(shutil.disk_usage(path.parent).free)
    return OSError(number, f"{os.strerror(number)} ({takes}{free} are free)", str(path))


def _size(count: float) -> str:
    """Text such as "4.2 MB"."""
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


def sha256_of_json(value: Any) -> str:
    """The sha256 of a value as JSON with sorted keys, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def cache_folder() -> Path:
    """The folder of downloads and derived files: $DIA_DIFFUSION_CACHE, else ~/.cache/dia-diffusion."""
    return Path(os.environ.get("DIA_DIFFUSION_CACHE") or Path.home() / ".cache" / "dia-diffusion")


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{PARTIAL}")


def _usual_mode() -> int:
    """The default mode of a new file; safetensors writes files that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
