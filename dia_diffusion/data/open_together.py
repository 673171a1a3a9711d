"""`open_images` on all processes of a launch."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from accelerate import Accelerator

from dia_diffusion.data.image_set import ImageSet
from dia_diffusion.data.sources import MEMORY_LIMIT, open_images
from dia_diffusion.distributed import first_on_each_machine


def open_images_together(
    source: str, accelerator: Accelerator, reading: Callable[[str, int, int], None], **kwargs: Any
) -> ImageSet:
    """The images on each process: read by one process of each machine first, then by the others.

    So a download or a memory map is made once a machine. What its processes decode into memory is limited together.

    Args:
        source: as for `open_images`, and so are the keyword arguments.
        accelerator: of the launch.
        reading: called on the main process with "images" or "bytes", how many are done, and of how many.

    Raises:
        InputError: as `open_images`; on all processes if on one.
    """
    if accelerator.is_main_process:
        kwargs |= {"progress": partial(reading, "images"), "download_progress": partial(reading, "bytes")}
    here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    kwargs = {"memory_limit": MEMORY_LIMIT // here, **kwargs}
    return first_on_each_machine(accelerator, lambda: open_images(source, **kwargs))
