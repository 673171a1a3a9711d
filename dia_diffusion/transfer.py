"""From the CPU to the device without waiting for it."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, in its own dtype: convert it first, so that a device without float64 never sees one.

    A copy from pageable memory would wait until a GPU has done all its earlier work; one from pinned memory is queued.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
