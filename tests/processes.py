"""Commands in processes of their own, to be connected, signalled and killed.

A command needs 3 to 10 s to import torch and what else it uses. These are forked from a server that has imported it
already, so that they start at once; each worker of pytest has one such server.
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
# Only a test that fails waits as long: long enough for the slowest machine, and shorter than pytest's own timeout.
PATIENCE = 200


class Forked:
    """A `dia-diffusion` command in a process, and a process group, of its own.

    It has this process's working directory and environment variables.

    Args:
        arguments: of the command, its name first.
        log: the file for its output; it is added to.
        prepare: called in the process before the command; must be picklable.
        environment: added to this process's.
    """

    def __init__(
        self, *arguments: object, log: Path, prepare: Callable[[], object] | None = None, **environment: str
    ) -> None:
        self.log = log
        self._start_of_log = log.stat().st_size if log.exists() else 0
        texts = [str(argument) for argument in arguments]
        given = {**os.environ, **environment}
        # A daemon: where a test fails, the command does not outlive pytest.
        self.process = FORKED.Process(target=_command, args=(texts, log, prepare, os.getcwd(), given), daemon=True)
        self.process.start()

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.join()

    def until(self, condition: Callable[[], object], seconds: float = PATIENCE) -> None:
        """Waits for something that this command does."""
        wait_for(lambda: condition() or self.process.exitcode is not None, seconds)
        assert condition(), self.text()

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code, as a shell shows it."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.kill()
            raise AssertionError(f"still running after {seconds} s: {self.text()}")
        return code if code >= 0 else 128 - code

    def text(self) -> str:
        """What this command has written so far."""
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
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a fork server ignores for its children
    from dia_diffusion.cli.main import main

    if prepare is not None:
        prepare()
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


class Child(Forked):
    """Stands for `subprocess.Popen` where a study or the quickstart starts commands of its own; see `children`."""

    held_step: ClassVar[int | None] = None
    """The step at which trainings wait until they are to end; train.gate beside train.log shows that one waits."""

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
    """Studies and the quickstart fork the commands that they start."""
    child = type("Child", (Child,), {})
    monkeypatch.setattr(launcher, "subprocess", SimpleNamespace(Popen=child, STDOUT=subprocess.STDOUT))
    monkeypatch.setattr(launcher, "POLL_SECONDS", 0.05)
    return child


def connected(rank: int, port: int, processes: int = 2, nodes: int = 1) -> dict[str, str]:
    """The environment that torchrun gives to one of several processes on a CPU, on as many nodes."""
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
    """A command on connected processes, in the order of their ranks; process r writes logs/log{r}."""
    port = free_port()
    return [
        Forked(*arguments, log=logs / f"log{rank}", prepare=prepare, **connected(rank, port, processes, nodes))
        for rank in range(processes)
    ]


def on_two_processes(work: Callable[..., Any], *args: object) -> list[Any]:
    """What work returns on each process, in order of rank, or the exception that ended the process.

    Work, arguments and results are pickled.
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
    """Makes a function wait after so many calls: to be called in the process.

    So a test can kill or signal a command at one place, however fast the machine is.

    Args:
        owner: the module or class that has the function, as "package.module" or "package.module:Class".
        gate: the file that is made when the function waits, and that ends its waiting when it is removed; None to wait
            for ever.
        rank: the only one of several connected processes that waits.
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
            while (gate is None or gate.exists()) and os.getppid() == parent:  # else pytest has ended
                time.sleep(0.005)
        return result

    setattr(place, name, held)


def hold_steps(steps: int, gate: Path | None = None, rank: int | None = None) -> None:
    """Makes a training wait within step number `steps`, before its line of metrics is written."""
    hold("dia_diffusion.training.trainer:Trainer", "train_step", steps, gate, rank)


def hold_checkpoints(files: int) -> None:
    """Makes writing checkpoints wait for ever after so many of their files."""
    hold("dia_diffusion.training.checkpoint", "save_file", files)


def hold_evaluation(chunks: int) -> None:
    """Makes an evaluation wait for ever after so many finished chunks."""
    hold("dia_diffusion.evaluation.feature_store:FeatureStore", "write", chunks)
