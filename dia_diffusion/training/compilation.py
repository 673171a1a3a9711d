"""Whether a run compiles its network: where that saves more time than it takes (`bench/run.py --suite train`)."""

import os
import shutil
from typing import Any, cast

import torch
from torch import nn

from dia_diffusion.errors import InputError

CUDA_GRAPHS = "cuda-graphs"


def compiled(model: nn.Module, setting: Any, max_steps: int, pays_after: int | None, device: torch.device) -> nn.Module:
    """The network that a run trains, with the same parameters.

    Args:
        model: as it was built.
        setting: train.compile: true, false, "cuda-graphs", or "auto", which is on where there is a CUDA GPU, and on a
            CPU for runs that are long enough. It goes by the run's whole length, so that one that is stopped and goes
            on computes as before.
        max_steps: of the run.
        pays_after: optimizer steps on a CPU after which compiling such a model has paid for itself; None: not known.
        device: that it trains on.

    Raises:
        InputError: "cuda-graphs" without a CUDA GPU.
    """
    if setting == CUDA_GRAPHS:
        if device.type != "cuda":
            raise InputError(f"train.compile {CUDA_GRAPHS} needs a CUDA GPU; accepted here: auto, true, false")
        return cast(nn.Module, torch.compile(model, mode="reduce-overhead"))  # which launches few graphs, not kernels
    if setting == "auto":
        long_enough = pays_after is not None and max_steps >= pays_after
        setting = device.type == "cuda" or (long_enough and find_compiler() is not None)
    return cast(nn.Module, torch.compile(model)) if setting else model


def find_compiler() -> str | None:
    """The C++ compiler that torch.compile uses on a CPU, None if there is none."""
    return next((name for name in (os.environ.get("CXX", ""), "g++", "clang++") if name and shutil.which(name)), None)
