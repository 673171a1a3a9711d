"""Weights that others ship as pickles (.pth): nothing in them is run, and they can't ask for more than they hold."""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from dia_diffusion.reading.archives import refuse_bomb

EXPANDED_LIMIT = 1 << 20
"""Tensors may take this many bytes more than their file: one number can stand for a tensor of any shape."""

PICKLE_START = b"\x80"
"""Of every protocol that torch has written."""


class NotTensors(ValueError):
    """A pickle holds something else than tensors by name."""


def load_pickled_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict that torch.save wrote, on the CPU.

    Raises:
        NotTensors: other things than tensors by name, or tensors of more bytes than the file.
        Exception: of almost any type, where unpickling fails or the file names code.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            refuse_bomb(archive, path)
    else:
        with path.open("rb") as file:
            if file.read(1) != PICKLE_START:  # torch takes anything else for a tar, which it would unpack
                raise ValueError("neither a zip nor a pickle")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(name, str) and _is_plain(t) for name, t in state.items()):
        raise NotTensors("holds other things than tensors by name")
    held, size = path.stat().st_size, sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if size > held + EXPANDED_LIMIT:
        raise NotTensors(f"has tensors of {size:,} bytes in a file of {held:,}")
    return dict(state)


def _is_plain(value: object) -> bool:
    """Whether it is a tensor whose numbers are all there."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
