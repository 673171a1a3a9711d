"""Commands in processes that can be killed, and checks of what a run left on disk."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.processes import free_port

ROOT = Path(__file__).parents[2]


class Launched:
    """Two connected processes under torchrun, which starts each one in its own session."""

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
        """The worker processes in the order of their ranks."""
        return sorted(psutil.Process(self.process.pid).children(), key=lambda child: child.pid)

    def kill(self) -> None:
        """Kills the launcher and its processes at once."""
        everyone = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for process in everyone:
            process.kill()
        self.process.wait()
        psutil.wait_procs(everyone)


def slow_checkpoints(seconds: float) -> None:
    """Pauses for `seconds` after each file of a checkpoint; to be called in the process that writes it."""
    from dia_diffusion.training import checkpoint

    save_file = checkpoint.save_file

    def slowly(*args: object) -> None:
        save_file(*args)
        time.sleep(seconds)

    checkpoint.save_file = slowly


def being_written(run: Path) -> list[Path]:
    """The files of a checkpoint that doesn't have its final name yet."""
    return list(run.glob("checkpoints/.step-*.partial/*"))


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in run.glob("checkpoints/step-????????"))


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".partial")]
