"""Diffusion transformers with Dense-and-Implicit Attention (arXiv 2210.16101)."""

import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["DIALSTM", "AttachedModel", "Position", "UViT", "UViTPipeline", "attach", "build_attention"]


def _is_command() -> bool:
    """Whether this process is `dia-diffusion NAME` or `python -m dia_diffusion NAME`."""
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    # Python puts "-m" there until it has found the module to run.
    return Path(program).stem == "dia-diffusion" or (
        program == "-m" and ("-m", "dia_diffusion") in pairwise(sys.orig_argv)
    )


# The command tells its options and refuses wrong ones without torch, whose import takes seconds; any other program
# gets all of this at once, since diffusers finds classes only in modules that are imported already.
if TYPE_CHECKING or not _is_command():
    from dia_diffusion.public import (
        DIALSTM,
        AttachedModel,
        Position,
        UViT,
        UViTPipeline,
        attach,
        build_attention,
    )


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dia_diffusion import public

    return getattr(public, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
