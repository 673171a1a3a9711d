"""Several connected processes (gloo) train the same model as one process."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.commands import launch as accelerate_launch
from accelerate.utils import compare_versions

from dia_diffusion.training import run_folder
from dia_diffusion.training.run_folder import read_metrics
from tests.processes import Forked, connected, free_port, hold_steps, start_connected, wait_for
from tests.training.conftest import TINY
from tests.training.run_files import weights
from tests.training.test_backbones import BACKBONES

MAIN = """
import sys
import torch
{setup}
from dia_diffusion.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def torchrun(
    tmp_path: Path, name: str, processes: int, *overrides: str, setup: str = ""
) -> tuple[list[str], dict[str, str]]:
    """The command and environment that train the tiny recipe on `processes` processes, none of them forked."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    script = tmp_path / "main.py"
    script.write_text(MAIN.format(setup=setup))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    command += [str(script), "train", "--config", str(recipe), "--output", str(tmp_path / name), *overrides]
    return command, {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def launch(
    tmp_path: Path,
    name: str,
    processes: int,
    *overrides: str,
    prepare: Callable[[], object] | None = None,
    nodes: int = 1,
    refused: str | None = None,
) -> Path:
    """Trains the tiny recipe on connected processes, or checks that all refuse with `refused`; returns its folder."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = ["train", "--config", tmp_path / "tiny.yaml", "--output", tmp_path / name, *overrides]
    running = start_connected(*command, logs=tmp_path, processes=processes, nodes=nodes, prepare=prepare)
    codes = [process.wait() for process in running]
    output = "".join(process.text() for process in running)
    if refused is None:
        assert codes == [0] * processes, output
    else:
        assert codes == [2] * processes and output.count(refused) == 1, output
        assert "Traceback" not in output
    return tmp_path / name


def set_float64() -> None:
    torch.set_default_dtype(torch.float64)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


SPLITS = {
    "UViT": ((), 4, 2),
    "UNet, SSIA": ((*BACKBONES["unet2d"], "--ssia.weight", "0.5"), 2, 1),
    "DiT, Muon": ((*BACKBONES["dit"], "--optimizer.name", "muon"), 2, 1),
}


@pytest.mark.parametrize(("options", "processes", "nodes"), SPLITS.values(), ids=SPLITS)
def test_processes_nodes_accumulation_and_recomputation_agree_in_float64(
    options: tuple[str, ...], processes: int, nodes: int, in_float64, tiny, train, tmp_path: Path
) -> None:
    train(tiny("one", *options))
    parts = ("--train.accumulation", "2", "--train.gradient_checkpointing", "true")
    one, several = (
        tmp_path / "one",
        launch(tmp_path, "several", processes, *options, *parts, prepare=set_float64, nodes=nodes),
    )
    expected, found = weights(one, 6), weights(several, 6)
    assert max(float((expected[key] - found[key]).abs().max()) for key in expected) < 1e-9
    assert losses(several) == pytest.approx(losses(one), rel=1e-9)


def test_a_run_resumes_with_another_number_of_processes(in_float64, tiny, train, tmp_path: Path) -> None:
    unit = ("--model.attention", "block-channels", "--optimizer.unit_learning_rate", "1e-2")
    train(tiny("whole", *unit))
    part = launch(tmp_path, "part", 2, *unit, "--train.max_steps", "3", prepare=set_float64)
    train(tiny("part", *unit))
    assert losses(part) == pytest.approx(losses(tmp_path / "whole"), rel=1e-9)


def test_refusals_are_printed_once_and_end_every_process(
    finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished("run")
    launch(tmp_path, "run", 2, "--seed", "1", refused="seed: 0 -> 1")
    launch(tmp_path, "new", 2, "--train.batch_size", "7", refused="must be a multiple of 2")
    # As on machines without a shared disk: the second process looks for the run or the images in another place.
    (tmp_path / "other").mkdir()
    elsewhere = partial(second_process_in, tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    launch(tmp_path, "apart", 2, "--output", "apart", prepare=elsewhere, refused="which differs between them")
    np.save(tmp_path / "images.npy", np.zeros((10, 8, 8), dtype=np.uint8))
    source = ["--data.source", "images.npy"]
    launch(tmp_path, "one", 2, *source, prepare=elsewhere, refused="is not a file or folder")


def second_process_in(folder: Path) -> None:
    run_folder.SECONDS_TO_SEE_A_FILE = 2
    if os.environ["RANK"] == "1":
        os.chdir(folder)


def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = ["train", "--config", tmp_path / "tiny.yaml", "--output", tmp_path / "run"]
    command += ["--train.max_steps", 1000, "--train.checkpoint_every", 900]
    gate = tmp_path / "gate"
    running = start_connected(*command, logs=tmp_path, prepare=partial(hold_steps, 3, gate, 0))
    running[0].until(gate.exists)
    running[1].send(signal.SIGTERM)
    gate.unlink()
    assert [process.wait() for process in running] == [143, 143]
    check_stopped(tmp_path, running[0].text())


@pytest.mark.long
def test_a_signal_to_torchrun_stops_all_processes_at_one_step(tmp_path: Path) -> None:
    """The only launch here with torchrun itself, as users start it."""
    options = ["--train.max_steps", "100000", "--train.checkpoint_every", "90000", "--train.compile", "false"]
    command, environment = torchrun(tmp_path, "run", 2, *options)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").is_file() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert "dia_diffusion/cli/main.py" not in errors, "no traceback of ours beside the launcher's own"
    check_stopped(tmp_path, errors)


def check_stopped(tmp_path: Path, errors: str) -> None:
    """Asserts that the run's only checkpoint is at the step named in the message, and that the run resumes after it."""
    (place,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(place.name.removeprefix("step-"))
    assert f"stopped after step {step:,}" in errors
    launch(tmp_path, "run", 2, "--train.max_steps", str(step + 1))
    assert len(losses(tmp_path / "run")) == step + 1


@pytest.mark.parametrize(
    "options",
    [
        "--cpu --num_processes 2",
        pytest.param(
            "--multi_gpu --num_processes 2",
            marks=pytest.mark.skipif(
                compare_versions("accelerate", "<", "1.13"),
                reason="Accelerate before 1.13 connects these processes by gloo",
            ),
        ),
        "--cpu --num_processes 2 --num_machines 2 --main_process_ip localhost --main_process_port 29511",
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU these launches connect their processes")
def test_processes_that_are_not_connected_are_refused(
    options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes started with the environment that `accelerate launch` gives them."""
    given: list[dict[str, str]] = []
    started = SimpleNamespace(wait=lambda: None, returncode=0)
    port = free_port()
    ranks = [connected(rank, port) for rank in range(2)]
    for rank in ranks:
        del rank["ACCELERATE_USE_CPU"]  # users set this for torchrun
    arguments = accelerate_launch.launch_command_parser().parse_args([*options.split(), "train.py"])
    with monkeypatch.context() as patch:
        popen = SimpleNamespace(Popen=lambda _, env: given.append(env) or started)
        patch.setattr(accelerate_launch, "subprocess", popen)
        patch.setattr("torch.distributed.run.run", lambda _: given.extend({**os.environ, **rank} for rank in ranks))
        accelerate_launch.launch_command(arguments)
    command = ["train", "--config", "digits_uvit_cpu", "--output", tmp_path / "run"]
    processes = [Forked(*command, log=tmp_path / "log", **environment) for environment in given]
    codes = [process.wait() for process in processes]
    text = (tmp_path / "log").read_text()
    assert codes and set(codes) == {2}, text
    assert text.count("processes and 1 is connected") == 1, text
    assert not (tmp_path / "run").exists()
