"""Commands in separate processes that tests can connect, signal and kill.

A command needs 3 to 10 s to import torch and its other dependencies. These processes are forked from a server that has
already imported them, so they start at once; each pytest worker has one such server.
"""

import multiprocessing
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, ClassVar

import pytest
import torch

from dia_diffusion.sweeps import launcher

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "tests.processes",
        "dia_diffusion.cli.train",
        "dia_diffusion.training.trainer",
        "dia_diffusion.cli.classify",
        "dia_diffusion.training.classification",
        "dia_diffusion.cli.sample",
        "dia_diffusion.evaluation.evaluate",
        "sklearn.datasets",
    ]
)
# Only failing tests wait this long: enough for the slowest machine, and shorter than pytest's own timeout.
PATIENCE = 200


class Forked:
    """A `dia-diffusion` command in its own process and process group.

    It has this process's working directory and environment variables.

    Args:
        arguments: the command's name and its arguments.
        log: the file to which its output is appended.
        prepare: called in the process before the command; must be picklable.
        environment: variables added to this process's.
    """

    def __init__(
        self, *arguments: object, log: Path, prepare: Callable[[], object] | None = None, **environment: str
    ) -> None:
        self.log = log
        self._start_of_log = log.stat().st_size if log.exists() else 0
        texts = [str(argument) for argument in arguments]
        given = {**os.environ, **environment}
        # A daemon, so that the command does not outlive pytest when a test fails.
        self.process = FORKED.Process(target=_command, args=(texts, log, prepare, os.getcwd(), given), daemon=True)
        self.process.start()

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.join()

    def until(self, condition: Callable[[], object], seconds: float = PATIENCE) -> None:
        """Waits until the condition holds; fails if the command ends before."""
        wait_for(lambda: condition() or self.process.exitcode is not None, seconds)
        assert condition(), self.text()

    def wait(self, seconds: float = PATIENCE) -> int:
        """Waits for the end; returns the exit code as a shell reports it."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.kill()
            raise AssertionError(f"still running after {seconds} s: {self.text()}")
        return code if code >= 0 else 128 - code

    def text(self) -> str:
        """The command's output so far."""
        return self.log.read_bytes()[self._start_of_log :].decode() if self.log.exists() else ""

    def last_line(self) -> str:
        return self.text().strip().splitlines()[-1]


def _command(
    arguments: list[str],
    log: Path,
    prepare: Callable[[], object] | None,
    folder: str,
    environment: Mapping[str, str],
) -> None:
    os.setsid()
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server's children ignore it
    from dia_diffusion.cli.main import main

    if prepare is not None:
        prepare()
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


class Child(Forked):
    """Replaces `subprocess.Popen` where a study or the quickstart starts commands; see `children`."""

    held_step: ClassVar[int | None] = None
    """The step at which trainings wait until they are terminated; train.gate next to train.log shows that one waits."""

    def __init__(self, call: list[str], env: dict[str, str], stdout: IO[str], stderr: int) -> None:
        assert call[:3] == [sys.executable, "-m", "dia_diffusion"] and stderr == subprocess.STDOUT
        log = Path(stdout.name)
        self.gate = log.with_suffix(".gate")
        prepare = None if self.held_step is None else partial(hold_steps, self.held_step, self.gate)
        super().__init__(*call[3:], log=log, prepare=prepare, **env)

    def poll(self) -> int | None:
        return self.process.exitcode

    returncode = property(poll)

    def terminate(self) -> None:
        self.process.terminate()
        self.gate.unlink(missing_ok=True)

    def kill(self) -> None:
        self.process.kill()


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> type[Child]:
    """Makes studies and the quickstart fork the commands that they start."""
    child = type("Child", (Child,), {})
    monkeypatch.setattr(launcher, "subprocess", SimpleNamespace(Popen=child, STDOUT=subprocess.STDOUT))
    monkeypatch.setattr(launcher, "POLL_SECONDS", 0.05)
    return child


def connected(rank: int, port: int, processes: int = 2, nodes: int = 1) -> dict[str, str]:
    """The environment that torchrun gives to one of `processes` CPU processes on `nodes` nodes."""
    local = processes // nodes
    numbers = {"RANK": rank, "LOCAL_RANK": rank % local, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": local}
    numbers |= {"GROUP_RANK": rank // local, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return {name: str(number) for name, number in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "ACCELERATE_USE_CPU": "true",
    }


def start_connected(
    *arguments: object,
    logs: Path,
    processes: int = 2,
    nodes: int = 1,
    prepare: Callable[[], object] | None = None,
) -> list[Forked]:
    """Starts a command on connected processes; returns them in order of rank. Process r writes logs/log{r}."""
    port = free_port()
    return [
        Forked(*arguments, log=logs / f"log{rank}", prepare=prepare, **connected(rank, port, processes, nodes))
        for rank in range(processes)
    ]


def on_two_processes(work: Callable[..., Any], *args: object) -> list[Any]:
    """The results of `work` on each process in order of rank, or the exception that ended the process.

    `work`, arguments and results are pickled.
    """
    port, results = free_port(), []
    for rank in (0, 1):
        result, end = FORKED.Pipe(duplex=False)
        FORKED.Process(target=_connected, args=(end, rank, port, work, args), daemon=True).start()
        end.close()
        results.append(result)
    assert all(result.poll(100) for result in results), "a process hangs"
    return [result.recv() for result in results]


def _connected(end: Connection, rank: int, port: int, work: Callable[..., Any], args: tuple[object, ...]) -> None:
    os.environ.update(connected(rank, port))
    torch.set_num_threads(1)
    try:
        end.send(work(*args))
    except Exception as error:
        end.send(error)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def hold(owner: str, name: str, calls: int, gate: Path | None = None, rank: int | None = None) -> None:
    """Makes a function of the current process wait after `calls` calls.

    This lets a test kill or signal a command at a fixed point, however fast the machine is.

    Args:
        owner: the module or class that has the function, as "package.module" or "package.module:Class".
        gate: a file that is created when the function waits; removing it ends the wait. None waits forever.
        rank: of several connected processes, the only one that waits.
    """
    if rank is not None and os.environ["RANK"] != str(rank):
        return
    place = pkgutil.resolve_name(owner)
    function, made, parent = getattr(place, name), 0, os.getppid()

    def held(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        result = function(*args, **kwargs)
        made += 1
        if made == calls:
            if gate is not None:
                gate.touch()
            while (gate is None or gate.exists()) and os.getppid() == parent:  # otherwise pytest has ended
                time.sleep(0.005)
        return result

    setattr(place, name, held)


def hold_steps(steps: int, gate: Path | None = None, rank: int | None = None) -> None:
    """Makes a training wait in step number `steps`, before the step's metrics are written."""
    hold("dia_diffusion.training.trainer:Trainer", "train_step", steps, gate, rank)


def hold_checkpoints(files: int) -> None:
    """Makes writing checkpoints wait forever after `files` files."""
    hold("dia_diffusion.training.checkpoint", "save_file", files)


def hold_evaluation(chunks: int) -> None:
    """Makes an evaluation wait forever after `chunks` finished chunks."""
    hold("dia_diffusion.evaluation.feature_store:FeatureStore", "write", chunks)
