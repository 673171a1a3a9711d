"""What the processes of a launch agree on, for one process and for two that are connected by gloo."""

import time
from datetime import timedelta
from functools import partial

import torch
from accelerate import Accelerator

from dia_diffusion.distributed import (
    all_agree,
    broadcast_from_rank_zero,
    first_on_each_machine,
    lost_a_process,
    on_all_ranks,
    on_rank_zero,
    start_accelerator,
)
from dia_diffusion.errors import InputError, RunError
from tests.two_processes import on_two_processes


def test_one_process_does_the_work_once() -> None:
    calls: list[int] = []
    assert first_on_each_machine(Accelerator(cpu=True), lambda: calls.append(1) or len(calls)) == 1
    assert calls == [1]


def impatient() -> None:
    """Makes the backend, once it is connected, give up after a second, as NCCL does after ten minutes."""
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1), torch.distributed.group.WORLD)


def wait_long() -> list[object]:
    accelerator = start_accelerator()
    impatient()
    main_process = accelerator.is_main_process
    on_rank_zero(accelerator, partial(time.sleep, 2))
    answers = [
        broadcast_from_rank_zero(accelerator, lambda: time.sleep(1.5) or {"seeds": [3, 5]}),
        all_agree(accelerator, True),
        all_agree(accelerator, main_process),
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
    seen = [{"seeds": [3, 5]}, True, False, InputError, "no image"]
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
