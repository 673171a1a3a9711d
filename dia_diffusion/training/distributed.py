"""What the processes of a run agree on: how many they are, when to stop, and what only one of them does."""

import os
import signal
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from dia_diffusion.errors import InputError


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
    # `accelerate launch --cpu --num_processes 2` starts one process and leaves only this trace of the other.
    launched_alone = "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and _from_accelerate_launch()
    if launched != accelerator.num_processes or launched_alone:
        raise InputError(
            f"the launcher asked for {'several' if launched_alone else launched} processes and "
            f"{accelerator.num_processes} is connected; on CPUs use ACCELERATE_USE_CPU=true torchrun --nproc_per_node N"
        )
    return accelerator


def _from_accelerate_launch() -> bool:
    return "ACCELERATE_DYNAMO_BACKEND" in os.environ


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

    def __init__(self) -> None:
        self.received = 0

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

    def agreed(self, accelerator: Accelerator) -> int:
        """The highest signal number that any process has received, 0 for none."""
        if accelerator.num_processes == 1:
            return self.received
        received = torch.tensor(self.received, device=accelerator.device)
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        return int(received)
