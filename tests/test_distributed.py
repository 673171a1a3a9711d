"""Which launches are refused, how connected processes agree, and which network interface gloo gets."""

import os
import socket
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from dia_diffusion import launch
from dia_diffusion.cli.main import main
from dia_diffusion.distributed import (
    broadcast_from_rank_zero,
    lost_a_process,
    on_all_ranks,
    on_rank_zero,
    start_accelerator,
)
from dia_diffusion.errors import InputError, RunError
from dia_diffusion.launch import check_launch, choose_gloo_interface
from tests.processes import on_two_processes
from tests.training.conftest import TINY


def impatient() -> None:
    """Makes the connected backend time out after a second, as NCCL does after ten minutes."""
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1), torch.distributed.group.WORLD)


def wait_long() -> list[object]:
    accelerator = start_accelerator()
    impatient()
    main_process = accelerator.is_main_process
    on_rank_zero(accelerator, partial(time.sleep, 2))
    answers = [
        broadcast_from_rank_zero(accelerator, lambda: time.sleep(1.5) or {"seeds": [3, 5]}),
    ]
    for failure in (InputError("no image"), OSError("no space")):
        try:
            on_all_ranks(accelerator, lambda failure=failure: _fail(failure) if not main_process else time.sleep(1.5))
        except Exception as error:
            answers += [type(error), str(error)]
    return answers


def _fail(failure: Exception) -> None:
    raise failure


def test_processes_wait_longer_for_each_other_than_their_backend_does() -> None:
    seen = [{"seeds": [3, 5]}, InputError, "no image"]
    assert on_two_processes(wait_long) == [[*seen, RunError, "no space"], [*seen, OSError, "no space"]]


def die_while_the_other_waits() -> None:
    accelerator = start_accelerator()
    if accelerator.is_main_process:
        on_rank_zero(accelerator, lambda: None)
    else:
        time.sleep(1)
        raise ValueError("not agreed on with anybody")


def test_a_dead_process_ends_those_that_wait_for_it() -> None:
    started = time.monotonic()
    waiting, died = on_two_processes(die_while_the_other_waits)
    assert isinstance(died, ValueError)
    assert isinstance(waiting, RuntimeError) and lost_a_process(waiting)
    assert time.monotonic() - started < 60


def launched_with(*options: str) -> dict[str, str]:
    """The variables that `accelerate launch` adds to the environment of its processes."""
    parsed = launch_command_parser().parse_args([*options, "--num_processes=2", "--main_process_port=0", "train.py"])
    parsed, _, _ = _validate_launch_command(parsed)
    return {name: value for name, value in prepare_multi_gpu_env(parsed).items() if name not in os.environ}


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (["--multi_gpu"], None),
        (["--multi_gpu", "--mixed_precision=bf16", "--debug", "--downcast_bf16"], None),
        (["--use_fsdp"], "ACCELERATE_USE_FSDP must be false, got true; only DDP is supported"),
        (["--multi_gpu", "--use_megatron_lm"], "ACCELERATE_USE_MEGATRON_LM must be false, got true; only DDP"),
        (["--multi_gpu", "--dynamo_backend=inductor"], "ACCELERATE_DYNAMO_BACKEND must be no, got INDUCTOR; launch w"),
    ],
)
def test_only_ddp_without_dynamo_is_accepted(
    options: list[str], refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in launched_with(*options).items():
        monkeypatch.setenv(name, value)
    if refused is None:
        check_launch()
    else:
        with pytest.raises(InputError, match=refused):
            check_launch()


@pytest.mark.parametrize(
    ("variable", "accepted", "refused"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", "4"),
        ("ACCELERATE_USE_DEEPSPEED", "false", "true"),
        ("ACCELERATE_USE_FSDP", "no", "1"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "0", "true"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "fp8"),
        ("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "NO", "DATA_PARALLEL"),
    ],
)
def test_variables_set_by_hand_are_checked(
    variable: str, accepted: str, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, accepted)
    check_launch()
    monkeypatch.setenv(variable, refused)
    with pytest.raises(InputError, match=f"{variable} must be [a-z1]+, got {refused}; "):
        check_launch()


def test_tpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "is_torch_xla_available", lambda: True)
    with pytest.raises(InputError, match="USE_TORCH_XLA must be 0 where torch_xla is installed"):
        check_launch()


def test_a_command_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert main(["train", "--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        "dia-diffusion train: error: ACCELERATE_GRADIENT_ACCUMULATION_STEPS must be 1, got 4; "
        "unset it and set `train.accumulation`\n"
    )
    assert not (tmp_path / "run").exists()


MANY = {"lo": "127.0.0.1", "eth0": "10.0.0.1", "ib0": "192.168.0.1", "docker0": "172.17.0.1"}
ONE = {"lo": "127.0.0.1", "eth0": "10.0.0.1"}


@pytest.mark.parametrize(
    ("name_is", "interfaces", "route", "variables", "expected"),
    [
        ("127.0.1.1", MANY, "192.168.0.1", {}, "ib0"),  # the route to the main machine
        ("127.0.1.1", ONE, "127.0.1.1", {}, "eth0"),  # on the main machine; its name resolves to loopback
        (None, ONE, None, {}, "eth0"),
        ("10.0.0.1", MANY, "10.0.0.1", {}, None),  # gloo finds eth0
        ("127.0.1.1", MANY, "10.0.0.1", {"LOCAL_WORLD_SIZE": "4"}, None),  # one machine
        ("127.0.1.1", MANY, "127.0.0.1", {"MASTER_ADDR": "127.0.0.1"}, None),  # two nodes on one machine
        ("127.0.1.1", MANY, "10.0.0.1", {"GLOO_SOCKET_IFNAME": "ib0"}, "ib0"),
        ("10.0.0.1", MANY, None, {"NCCL_SOCKET_IFNAME": "ib"}, "ib0"),
        ("10.0.0.1", MANY, None, {"NCCL_SOCKET_IFNAME": "=docker0"}, "docker0"),
        ("10.0.0.1", MANY, "10.0.0.1", {"NCCL_SOCKET_IFNAME": "^docker,lo"}, "eth0"),
        ("10.0.0.1", MANY, "127.0.1.1", {"NCCL_SOCKET_IFNAME": "ib,eth"}, "eth0"),  # NCCL uses both
        ("10.0.0.1", MANY, "10.0.0.1", {"NCCL_SOCKET_IFNAME": "nothing"}, None),
        ("127.0.1.1", MANY, "127.0.1.1", {}, InputError),
    ],
)
def test_gloo_gets_an_interface_that_other_machines_reach(
    name_is: str | None,
    interfaces: dict[str, str],
    route: str | None,
    variables: dict[str, str],
    expected: str | type[InputError] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two_machines = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "main"}
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that a value set by the call is removed afterwards
        monkeypatch.delenv(name)
    for name, value in {**two_machines, **variables}.items():
        monkeypatch.setenv(name, value)
    addresses = {name: [SimpleNamespace(family=socket.AF_INET, address=ip)] for name, ip in interfaces.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: dict.fromkeys(interfaces, SimpleNamespace(isup=True)))
    monkeypatch.setattr(launch, "_address", lambda host: name_is)
    monkeypatch.setattr(launch, "_local_address", lambda peer: route)
    if expected is InputError:
        with pytest.raises(InputError, match=r"GLOO_SOCKET_IFNAME must be .*interfaces are eth0, ib0, docker0"):
            choose_gloo_interface()
    else:
        choose_gloo_interface()
        assert os.environ.get("GLOO_SOCKET_IFNAME") == expected
