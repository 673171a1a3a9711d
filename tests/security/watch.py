"""Watches what a reader does to the machine while it reads a hostile file, and checks how it ends."""

import os
import re
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dia_diffusion.errors import InputError, RunError

MEMORY_LIMIT = 400 << 20
"""Bytes of memory that a reader may add; each bomb in the tests expands to gigabytes."""
SECONDS_LIMIT = 100
"""Time after which the reader of a pipe or a device counts as hanging."""
STARTED = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pty.spawn")
CONNECTED = ("socket.connect", "socket.getaddrinfo", "urllib.Request")
WRITTEN = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate")
# Files that Python and its libraries open themselves, at any place.
OWN_FILES = re.compile(r"\.pyc(\.\d+)?$|__pycache__|^/dev/null$|^/proc/|^/sys/")


@dataclass
class Seen:
    """What happened in a block."""

    started: list[str] = field(default_factory=list)
    connected: list[str] = field(default_factory=list)
    read: list[Path] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)


_watching: Seen | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if (seen := _watching) is None:
        return
    if event in STARTED:
        seen.started.append(f"{event} {arguments}")
    elif event in CONNECTED:
        seen.connected.append(f"{event} {arguments}")
    elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path, mode, flags = arguments
        if OWN_FILES.search(os.fsdecode(path)):
            return
        writes = any(letter in (mode or "") for letter in "wxa+") or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
        (seen.written if writes else seen.read).append(Path(os.path.abspath(os.fsdecode(path))))
    elif event in WRITTEN and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.fsdecode(arguments[0])
        if not OWN_FILES.search(path):
            seen.written.append(Path(os.path.abspath(path)))


sys.addaudithook(_audit)  # Python can't remove a hook; this one does nothing outside of `watched`


@contextmanager
def watched() -> Iterator[Seen]:
    """Records what Python starts, connects to, opens and writes in the block."""
    global _watching
    _watching = seen = Seen()
    try:
        yield seen
    finally:
        _watching = None


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise AssertionError(name)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Asserts that the block raises the process's peak memory by less than MEMORY_LIMIT."""
    if not Path("/proc/self/clear_refs").exists():  # on other systems the peak can't be reset and only rises
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        yield
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_LIMIT
        return
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmHWM")
    yield
    grown = _status("VmHWM") - before
    assert grown < MEMORY_LIMIT, f"{grown >> 20} MiB"


def check_line(line: str) -> None:
    """Asserts that a message is one line of bounded length without terminal control characters."""
    assert line.strip() and line.isprintable(), line
    assert len(line) < 3000, line


class Sandbox:
    """A folder for hostile files, one next to it that nothing may touch, and one for a reader's cache."""

    def __init__(self, folder: Path):
        self.folder, self.outside, self.cache = folder / "given", folder / "outside", folder / "cache"
        self.folder.mkdir()
        self.outside.mkdir()
        self.marker = self.outside / "marker"
        """The file that hostile files write if they are run."""
        self.secret = self.outside / "secret.png"
        self.secret.write_bytes(b"secret")

    def watch(self, call: Callable[[], Any]) -> Any:
        """Returns the call's value, or the InputError or RunError that it raises; asserts that it does nothing else."""
        ended: list[Any] = []

        def run() -> None:
            try:
                ended.append(call())
            except (InputError, RunError) as error:
                ended.append(error)
            except BaseException as error:
                ended.append(_Other(error))

        before = {path: path.read_bytes() for path in self.outside.iterdir()}
        with watched() as seen, bounded_memory():
            thread = threading.Thread(target=run, daemon=True)  # a thread that waits for a pipe can't be stopped
            thread.start()
            thread.join(SECONDS_LIMIT)
        assert not thread.is_alive(), f"still reading after {SECONDS_LIMIT} s"
        result = ended[0]
        if isinstance(result, _Other):
            raise AssertionError(f"raises {type(result.error).__name__}: {result.error}") from result.error
        assert not self.marker.exists(), "a hostile file was run"
        assert {path: path.read_bytes() for path in self.outside.iterdir()} == before
        assert not seen.started and not seen.connected, (seen.started, seen.connected)
        touched = [path for path in (*seen.read, *seen.written) if path.is_relative_to(self.outside)]
        assert not touched, f"opens {touched}"
        elsewhere = [p for p in seen.written if not any(map(p.is_relative_to, (self.folder, self.cache)))]
        assert not elsewhere, f"writes {elsewhere}"
        return result

    def refused(self, call: Callable[[], Any], *named: object) -> str:
        """The message of the InputError that the call must raise: one line that contains all of `named`."""
        error = self.watch(call)
        assert isinstance(error, InputError), f"accepted: {error!r:.300}"
        check_line(str(error))
        for name in named:
            assert str(name) in str(error), str(error)
        return str(error)

    def survived(self, call: Callable[[], Any]) -> Any:
        """The call's value, or None if it refuses in one line."""
        result = self.watch(call)
        if isinstance(result, InputError | RunError):
            check_line(str(result))
            return None
        return result


@dataclass
class _Other:
    error: BaseException


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """A sandbox that also holds whatever readers cache."""
    made = Sandbox(tmp_path)
    monkeypatch.setenv("DIA_DIFFUSION_CACHE", str(made.cache))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(made.cache / "datasets"))
    return made
