"""What a command works with is imported once its arguments are known to be right, and as fast as it can be."""

import atexit
import gc
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports() -> Iterator[None]:
    """Around the imports of what needs torch or diffusers.

    Their 700,000 objects stay for good. Looking among them for garbage again and again takes a sixth of the time of
    importing them, so that isn't done meanwhile, and afterwards they are left out of it. When the process ends, Python
    would look again, for most of a second, at what ends with it anyway.
    """
    # What importing diffusers 0.36 says of one of its own models wherever there is no GPU.
    warnings.filterwarnings("ignore", "User provided device_type of 'cuda', but CUDA is not available")
    first = "torch" not in sys.modules
    if first:
        gc.disable()
        atexit.register(gc.freeze)
    try:
        yield
        if "diffusers" in sys.modules:
            _prepare_diffusers()
    finally:
        if first:
            gc.freeze()
            gc.enable()


def _prepare_diffusers() -> None:
    from diffusers.utils import logging

    import dia_diffusion.public  # noqa: F401  # so that diffusers finds the classes, as after any import of the package

    # Its bars and remarks on loading say nothing that a person at this command line could act on.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
