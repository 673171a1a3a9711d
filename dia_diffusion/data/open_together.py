"""`open_images` on all processes of a launch."""

from collections.abc import Callable
from functools import partial
from typing import Any

from accelerate import Accelerator

from dia_diffusion.data.hf_datasets import PREFIX
from dia_diffusion.data.image_set import ImageSet
from dia_diffusion.data.sources import DOWNLOADS, open_images
from dia_diffusion.distributed import first_on_each_machine, together


def open_images_together(
    source: str, accelerator: Accelerator, reading: Callable[[str, int, int], None], **kwargs: Any
) -> ImageSet:
    """The images on each process; what comes over the network comes to one process of each machine first.

    Args:
        source: as for `open_images`, and so are the keyword arguments.
        accelerator: of the launch.
        reading: called on the main process with "images" or "bytes", how many are done, and of how many.

    Raises:
        InputError: as `open_images`; on all processes if on one.
    """
    if accelerator.is_main_process:
        kwargs |= {"progress": partial(reading, "images"), "download_progress": partial(reading, "bytes")}
    from_network = source in DOWNLOADS or source.startswith(PREFIX)
    in_turn = first_on_each_machine if from_network else together
    return in_turn(accelerator, lambda: open_images(source, **kwargs))
