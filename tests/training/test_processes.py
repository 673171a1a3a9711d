"""Several connected processes (gloo) train the model that one trains."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dia_diffusion.training.run_folder import read_metrics
from tests.training.conftest import TINY

MAIN = """
import sys
import torch
{setup}
from dia_diffusion.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(
    tmp_path: Path, name: str, processes: int, *overrides: str, setup: str = "", nodes: int = 1
) -> tuple[list[str], dict[str, str]]:
    """The command, but for the node's rank, and the environment that train the tiny recipe on so many processes."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    script = tmp_path / "main.py"
    script.write_text(MAIN.format(setup=setup))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes // nodes}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", f"--nnodes={nodes}"]
    command += [str(script), "train", "--config", str(recipe), "--output", str(tmp_path / name), *overrides]
    return command, {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def launch(
    tmp_path: Path,
    name: str,
    processes: int,
    *overrides: str,
    setup: str = "",
    nodes: int = 1,
    refused: str | None = None,
) -> Path:
    """Trains the tiny recipe on so many connected processes, or sees it refused with this text; the run's folder."""
    command, environment = torchrun(tmp_path, name, processes, *overrides, setup=setup, nodes=nodes)
    running = [
        subprocess.Popen(
            [*command[:3], f"--node_rank={node}", *command[3:]], env=environment, stderr=subprocess.PIPE, text=True
        )
        for node in range(nodes)
    ]
    errors = "".join(process.communicate(timeout=200)[1] for process in running)
    if refused is not None:
        assert all(process.returncode for process in running) and errors.count(refused) == 1, errors
        assert "dia_diffusion/cli/main.py" not in errors, "no traceback of ours beside the launcher's own"
    else:
        assert [process.returncode for process in running] == [0] * nodes, errors
    return tmp_path / name


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    options = ["--train.max_steps", "50", "--train.checkpoint_every", "50"]
    one, two = launch(tmp_path, "one", 1, *options), launch(tmp_path, "two", 2, *options)
    assert len(losses(one)) == 50
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


def test_processes_nodes_accumulation_and_recomputation_agree_in_float64(tmp_path: Path) -> None:
    setup = "torch.set_default_dtype(torch.float64)"
    one = launch(tmp_path, "one", 1, setup=setup)
    four = launch(tmp_path, "four", 4, "--train.accumulation", "2", setup=setup)
    checkpointed = launch(tmp_path, "three", 2, "--train.gradient_checkpointing", "true", setup=setup)
    nodes = launch(tmp_path, "nodes", 2, setup=setup, nodes=2)
    expected = load_file(one / "checkpoints" / "step-00000006" / "model.safetensors")
    for run in (four, checkpointed, nodes):
        weights = load_file(run / "checkpoints" / "step-00000006" / "model.safetensors")
        assert max(float((expected[key] - weights[key]).abs().max()) for key in expected) < 1e-9
        assert losses(run) == pytest.approx(losses(one), rel=1e-9)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    setup = "torch.set_default_dtype(torch.float64)"
    unit = ["--model.attention", "block-channels", "--optimizer.unit_learning_rate", "1e-2"]
    whole = launch(tmp_path, "whole", 1, *unit, setup=setup)
    launch(tmp_path, "part", 2, *unit, "--train.max_steps", "3", setup=setup)
    part = launch(tmp_path, "part", 1, *unit, setup=setup)
    assert losses(part) == pytest.approx(losses(whole), rel=1e-9)


def test_refusals_are_told_once_and_end_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(tmp_path, "run", 2, "--train.max_steps", "3")
    launch(tmp_path, "run", 2, "--seed", "1", refused="seed: 0 -> 1")
    launch(tmp_path, "new", 2, "--train.batch_size", "7", refused="accepted: a multiple of 2")
    # As on machines that don't share a disk: the second process looks for the run, or the images, in another place.
    elsewhere = "import os; os.chdir(sys.argv[-1]) if os.environ['RANK'] == '1' else None; sys.argv.pop()"
    elsewhere += "; from dia_diffusion.training import run_folder; run_folder.SECONDS_TO_SEE_A_FILE = 2"
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(tmp_path)
    launch(tmp_path, "apart", 2, "--output", "apart", str(other), setup=elsewhere, refused="must share it")
    np.save(tmp_path / "images.npy", np.zeros((10, 8, 8), dtype=np.uint8))
    launch(
        tmp_path, "one", 2, "--data.source", "images.npy", str(other), setup=elsewhere, refused="is no file or folder"
    )


def test_a_signal_stops_all_processes_at_one_step(tmp_path: Path) -> None:
    command, environment = torchrun(
        tmp_path, "run", 2, "--train.max_steps", "100000", "--train.checkpoint_every", "90000"
    )
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not (tmp_path / "run" / "metrics.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    (place,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(place.name.removeprefix("step-"))
    assert f"stopped after step {step:,}" in errors
    launch(tmp_path, "run", 2, "--train.max_steps", str(step + 1))
    assert len(losses(tmp_path / "run")) == step + 1


@pytest.mark.parametrize(
    "command",
    [
        ["accelerate.commands.launch", "--cpu", "--num_processes", "2"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
        [
            "accelerate.commands.launch",
            "--cpu",
            "--num_machines",
            "2",
            "--num_processes",
            "2",
            "--machine_rank",
            "0",
            "--main_process_ip",
            "localhost",
            "--main_process_port",
            "29511",
        ],
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU these launches connect their processes")
def test_processes_that_are_not_connected_are_refused(command: list[str], tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(MAIN.format(setup=""))
    arguments = [str(script), "train", "--config", "digits_uvit_cpu", "--output", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command, *arguments], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode != 0 and "processes and 1 is connected" in done.stderr
    assert not (tmp_path / "run").exists()
