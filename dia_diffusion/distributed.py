"""What the processes of a launch agree on: how many they are, when to stop, and what only the main one does."""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs

from dia_diffusion.errors import InputError, RunError


def start_accelerator(mixed_precision: str = "none", **kwargs: Any) -> Accelerator:
    """Accelerate's engine for this process.

    Raises:
        InputError: the launcher asked for more processes than are connected, or fp16 without a GPU.
    """
    if mixed_precision == "fp16" and not torch.cuda.is_available():
        raise InputError("train.mixed_precision fp16 needs a CUDA GPU; accepted here: none, bf16")
    accelerator = Accelerator(
        mixed_precision="no" if mixed_precision == "none" else mixed_precision,
        # Every parameter gets a gradient at every step, so DDP needn't look for unused ones.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        **kwargs,
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    launched_alone = _started_alone()
    if launched != accelerator.num_processes or launched_alone:
        raise InputError(
            f"the launcher asked for {'several' if launched_alone else launched} processes and "
            f"{accelerator.num_processes} is connected; on CPUs use ACCELERATE_USE_CPU=true torchrun --nproc_per_node N"
        )
    return accelerator


def check_trackers(names: list[str]) -> None:
    """Raises InputError for a tracker that Accelerate does not know or that is not installed; it would skip it."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            raise InputError(f"tracker {name!r} is not installed; accepted here: {', '.join(available) or 'none'}")


def _started_alone() -> bool:
    """Whether this is the one process that `accelerate launch --cpu --num_processes 2` starts.

    The address of its missing peers is the only trace; launched with one process, Accelerate sets none.
    """
    peers = os.environ.get("MASTER_ADDR") == "127.0.0.1" and "MASTER_PORT" in os.environ
    return peers and "ACCELERATE_DYNAMO_BACKEND" in os.environ and "WORLD_SIZE" not in os.environ


def all_agree(accelerator: Accelerator, value: bool) -> bool:
    """Whether the value is true on every process."""
    return bool(accelerator.gather(torch.tensor([value], device=accelerator.device)).all())


def on_main(accelerator: Accelerator, work: Callable[[], object]) -> None:
    """Does work on the main process while the others wait; what it raises is raised on all of them.

    Raises:
        InputError, RunError: as the work did; an OSError becomes a RunError on the other processes.
    """
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            work()
        except (InputError, RunError, OSError) as error:
            failure = error
    if accelerator.num_processes > 1:
        failure = _failure_of_main(accelerator, failure)
    if failure is not None:
        raise failure


def _failure_of_main(accelerator: Accelerator, failure: Exception | None) -> Exception | None:
    """Tells the other processes what failed on the main one."""
    kind = 0 if failure is None else 1 if isinstance(failure, InputError) else 2
    text = str(failure or "").encode()
    header = torch.tensor([kind, len(text)], device=accelerator.device)
    torch.distributed.broadcast(header, src=0)
    kind, length = header.tolist()
    if not kind:
        return None
    content = torch.zeros(length, dtype=torch.uint8, device=accelerator.device)
    if accelerator.is_main_process:
        content = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(accelerator.device)
    torch.distributed.broadcast(content, src=0)
    text = content.cpu().numpy().tobytes()
    if kind == 1:
        return failure or InputError(text.decode())
    other = RunError(text.decode())
    other.told = True
    return failure or other


def micro_batch_size(batch_size: int, num_processes: int, accumulation: int) -> int:
    """Images a process takes at once.

    Raises:
        InputError: the global batch can't be split evenly.
    """
    parts = num_processes * accumulation
    if batch_size % parts:
        raise InputError(
            f"train.batch_size {batch_size} is not divisible by {num_processes} processes x {accumulation} "
            f"accumulations; accepted: a multiple of {parts}"
        )
    return batch_size // parts


class StopSignal:
    """Notes SIGINT and SIGTERM, for all processes to stop at the same step; a second SIGINT ends at once."""

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self.received = 0
        # Over gloo, so that asking the others in every step doesn't wait for a GPU.
        self._group: Any = None
        if accelerator is not None and accelerator.num_processes > 1:
            self._group = torch.distributed.new_group(backend="gloo")

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
        """The highest signal number that any process has received, 0 for none."""
        if self._group is None:
            return self.received
        received = torch.tensor(self.received)
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return int(received)
