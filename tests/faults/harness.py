"""Commands in processes of their own, to be killed and signalled; and what a run must have left in the end."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from tests.training.run_files import metrics, weights
from tests.training.test_processes import free_port

ROOT = Path(__file__).parents[2]
# A command needs some 5 s to import what it needs; one that is forked from a server that has done so needs none.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.faults.harness", "dia_diffusion.cli.train", "dia_diffusion.training.loop"])


class Forked:
    """A command in a process, and a process group, of its own."""

    def __init__(
        self, *arguments: object, log: Path, prepare: Callable[[], None] | None = None, **environment: str
    ) -> None:
        self.log = log
        texts = [str(argument) for argument in arguments]
        # A daemon: where a test fails, the command does not outlive it.
        self.process = FORKED.Process(target=_command, args=(texts, log, prepare, environment), daemon=True)
        self.process.start()

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.join()

    def until(self, condition: Callable[[], object], seconds: float = 60) -> None:
        """Waits for something that this command does."""
        wait_for(lambda: condition() or self.process.exitcode is not None, seconds)
        assert condition(), self.text()

    def wait(self, seconds: float = 60) -> int:
        """The exit code, as a shell shows it."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.kill()
            raise AssertionError(f"still running after {seconds} s: {self.text()}")
        return code if code >= 0 else 128 - code

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def last_line(self) -> str:
        return self.text().strip().splitlines()[-1]


def _command(arguments: list[str], log: Path, prepare: Callable[[], None] | None, environment: dict[str, str]) -> None:
    os.setsid()
    with log.open("w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a fork server ignores for its children
    from dia_diffusion.cli.main import main

    if prepare is not None:
        prepare()
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def connected(rank: int, port: int) -> dict[str, str]:
    """The environment of one of two processes that are started by hand."""
    names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    return {**names, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}


class Launched:
    """Two connected processes under torchrun, each in a session of its own, as that starts them."""

    def __init__(self, *arguments: object, log: Path, seconds_between_files: float = 0.0) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
        command = [*torchrun, "--", str(ROOT / "tests" / "faults" / "slow_main.py"), str(seconds_between_files)]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        with log.open("a", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [*command, *map(str, arguments)],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def workers(self) -> list[psutil.Process]:
        """In the order of their ranks."""
        return sorted(psutil.Process(self.process.pid).children(), key=lambda child: child.pid)

    def kill(self) -> None:
        """The launcher and its processes, at one moment."""
        everyone = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for process in everyone:
            process.kill()
        self.process.wait()
        psutil.wait_procs(everyone)


def slow_checkpoints(seconds: float) -> None:
    """Makes writing a checkpoint take so long after each of its files; to be called in the process that writes."""
    from dia_diffusion.training import checkpoint

    save_file = checkpoint.save_file

    def slowly(*args: object) -> None:
        save_file(*args)
        time.sleep(seconds)

    checkpoint.save_file = slowly


def slow_steps(seconds: float) -> None:
    """Makes each step of a training take so much longer."""
    from dia_diffusion.training.loop import Trainer

    advance = Trainer.advance

    def slowly(self: Trainer) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(seconds)
        return advance(self)

    Trainer.advance = slowly  # type: ignore[method-assign]


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def being_written(run: Path) -> list[Path]:
    """The files of a checkpoint that has not got its name yet."""
    return list(run.glob("checkpoints/.step-*.partial/*"))


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in run.glob("checkpoints/step-????????"))


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".partial")]


def assert_same_runs(run: Path, whole: Path, step: int) -> None:
    """Metrics but for times, weights, their average and the optimizer's state, bit for bit."""
    assert metrics(run) == metrics(whole)
    for name in ("model", "ema", "optimizer"):
        if (whole / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors").is_file():
            ours, theirs = weights(run, step, name), weights(whole, step, name)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
