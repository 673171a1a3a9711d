"""Two connected processes (gloo) train and test the classifier that one does; without norms, which see a part each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dia_diffusion.training.run_folder import read_metrics
from tests.training.classify import tiny
from tests.training.test_processes import free_port

MAIN = "import sys\nfrom dia_diffusion.cli.main import main\nsys.exit(main(['classify', *sys.argv[1:]]))\n"


def metrics(tmp_path: Path, processes: int, *overrides: str) -> list[dict]:
    script, output = tmp_path / "main.py", tmp_path / str(processes)
    script.write_text(MAIN)
    tiny(tmp_path, "run")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", str(script)]
    command += [
        "--config",
        str(tmp_path / "classify.yaml"),
        "--model.norm",
        "none",
        "--output",
        str(output),
        *overrides,
    ]
    subprocess.run(command, env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}, check=True)
    return read_metrics(output / "metrics.jsonl")


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    alone, together = metrics(tmp_path, 1), metrics(tmp_path, 2)
    assert len(alone) == len(together) == 8
    for one, two in zip(alone, together, strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {"images_per_second", "peak_memory_mib"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4), (key, one["step"])
