"""The ranks of a launch: start, collective calls that raise on all ranks or none, stop signals, copies to devices."""

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from dia_diffusion.environment import keep_freed_memory
from dia_diffusion.errors import InputError, RunError
from dia_diffusion.launch import check_launch, choose_gloo_interface


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor copied to the device in its own dtype; convert float64 first, since some devices lack it.

    It is pinned first, so that the copy is queued; a copy from pageable memory would wait for the GPU's earlier work.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


T = TypeVar("T")


def shard(items: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """The items of process `rank`: every world_size-th. Shares differ by at most one item."""
    return items[rank::world_size]


PATIENCE = timedelta(days=1)
"""How long ranks wait for a rank that decodes a dataset, writes files or computes metrics."""

# How gloo, NCCL and torch's store report that another process is gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "Timed out")


def start_accelerator(mixed_precision: str = "none", **kwargs: Any) -> Accelerator:
    """Accelerate's engine for this process.

    Raises:
        InputError: the launcher requested an unsupported feature or more processes than are connected, or the
            processes chose different precisions.
    """
    check_launch()
    choose_gloo_interface()
    accelerator = Accelerator(
        mixed_precision="no" if mixed_precision == "none" else mixed_precision,
        # Every parameter gets a gradient at every step, so DDP needn't look for unused ones.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        **kwargs,
    )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    launched_alone = _started_alone()
    if launched != accelerator.num_processes or launched_alone:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # or a process that exits here disconnects one that is still connecting
        raise InputError(
            f"the launcher asked for {'several' if launched_alone else launched} processes and "
            f"{accelerator.num_processes} is connected; on CPUs use ACCELERATE_USE_CPU=true torchrun --nproc_per_node "
            "N (or unset MASTER_ADDR where one process is meant)"
        )
    if accelerator.num_processes > 1:
        gloo_group()  # connect now, before any process is busy or has failed
    number = {"no": 0, "bf16": 1, "fp16": 2}[accelerator.mixed_precision]
    numbers = accelerator.gather(torch.tensor([number], device=accelerator.device))
    if not bool((numbers == numbers[0]).all()):
        raise InputError(
            "`train.mixed_precision` must be none, bf16 or fp16 in a launch on unlike machines, got auto, which is "
            "bf16 on some of them only"
        )
    return accelerator


def check_trackers(names: list[str]) -> None:
    """Raises InputError for an unknown or uninstalled tracker, which Accelerate would silently skip."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            raise InputError(
                f"`trackers` must be installed, which are {', '.join(available) or 'none'} here, got {name!r}"
            )


def _started_alone() -> bool:
    """Whether this is the one process that `accelerate launch --cpu --num_processes 2` starts.

    The only sign is the address of its missing peers, which Accelerate doesn't set when it launches a single process.
    """
    peers = "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ
    return peers and "ACCELERATE_DYNAMO_BACKEND" in os.environ and "WORLD_SIZE" not in os.environ


_gloo_groups: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # world group -> gloo group of the same processes


def gloo_group() -> Any:
    """The gloo process group of all ranks. The first call creates it, so all ranks must make that call.

    It is for long waits: NCCL kills a process that has waited for 10 minutes. Gloo waits for `PATIENCE`, fails at once
    if a process dies, and doesn't synchronize the GPU.
    """
    world = torch.distributed.group.WORLD
    if world not in _gloo_groups:
        _gloo_groups[world] = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    return _gloo_groups[world]


def _gather(accelerator: Accelerator, number: int) -> list[int]:
    """The number of each rank, in order."""
    numbers = [torch.zeros((), dtype=torch.int64) for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather(numbers, torch.tensor(number), group=gloo_group())
    return [int(each) for each in numbers]


def on_all_ranks(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Runs work on each rank, without communication in it; if any rank raises, all ranks raise.

    Raises:
        InputError: the work raised InputError on any rank.
        RunError: the work raised anything else on another rank.
    """
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:  # any kind; otherwise the other ranks would wait for this one
        failure = error
    if accelerator.num_processes > 1:
        failure = _failure_anywhere(accelerator, failure)
    if failure is not None:
        raise failure
    return result


def on_rank_zero(accelerator: Accelerator, work: Callable[[], object]) -> None:
    """Runs work on rank 0 while the others wait; if it raises, all ranks raise, as in `on_all_ranks`."""
    on_all_ranks(accelerator, work if accelerator.is_main_process else lambda: None)


def broadcast_from_rank_zero(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """The result of work on rank 0, sent to all ranks as JSON; if it raises, all ranks raise, as in `on_all_ranks`."""
    result: list[T] = []
    on_rank_zero(accelerator, lambda: result.append(work()))
    if accelerator.num_processes == 1:
        return result[0]
    value: T = json.loads(_broadcast(accelerator, json.dumps(result[0]) if result else "", source=0))
    return value


def first_on_each_machine(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Runs work on one rank per machine, then on all ranks, which find the first one's results in the cache."""
    if accelerator.num_processes > 1:
        on_all_ranks(accelerator, work if accelerator.is_local_main_process else lambda: None)
    return on_all_ranks(accelerator, work)


def _failure_anywhere(accelerator: Accelerator, failure: Exception | None) -> Exception | None:
    """This rank's failure, else that of the first rank that has one."""
    kind = 0 if failure is None else 1 if isinstance(failure, InputError) else 2
    kinds = _gather(accelerator, kind)
    if not any(kinds):
        return None
    source = next(rank for rank, kind in enumerate(kinds) if kind)
    message = _broadcast(accelerator, str(failure) or type(failure).__name__, source)
    if failure is not None:
        return failure
    if kinds[source] == 1:
        return InputError(message)
    elsewhere = RunError(message)
    elsewhere.reported = True
    return elsewhere


def _broadcast(accelerator: Accelerator, text: str, source: int) -> str:
    """The text of rank `source`, on all ranks."""
    encoded = bytearray(text.encode())
    length = torch.tensor(len(encoded))
    torch.distributed.broadcast(length, src=source, group=gloo_group())
    content = torch.zeros(int(length), dtype=torch.uint8)
    if accelerator.process_index == source:
        content = torch.frombuffer(encoded, dtype=torch.uint8)
    torch.distributed.broadcast(content, src=source, group=gloo_group())
    return content.numpy().tobytes().decode()


def micro_batch_size(batch_size: int, num_processes: int, accumulation: int) -> int:
    """Images per forward pass of a rank.

    Raises:
        InputError: the global batch can't be split evenly.
    """
    parts = num_processes * accumulation
    if batch_size % parts:
        raise InputError(
            f"`train.batch_size` must be a multiple of {parts}, which is {num_processes} processes x {accumulation} "
            f"accumulations, got {batch_size}"
        )
    return batch_size // parts


class StopSignal:
    """Records SIGINT and SIGTERM, so that all ranks stop at the same step; a second SIGINT raises KeyboardInterrupt."""

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self.received = 0
        self._several = accelerator is not None and accelerator.num_processes > 1

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number

    def agreed(self) -> int:
        """The highest signal number that any rank has received, 0 for none."""
        if not self._several:
            return self.received
        received = torch.tensor(self.received)
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX, group=gloo_group())
        return int(received)


def lost_a_process(error: RuntimeError) -> str | None:
    """The part of the error's message that says that another process or its machine is gone; None for other errors."""
    return next((text for text in LOST if text in str(error)), None)


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: GPU memory on a GPU, else main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not available on Windows

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
