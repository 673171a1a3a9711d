"""Any image source -> uint8 images (N, C, H, W) and labels, by index."""

from dia_diffusion.data.decode import read_image
from dia_diffusion.data.image_set import ImageSet, ImageSource, array_source
from dia_diffusion.data.sources import FORMATS, SPLITS, DataFormat, Request, open_images

__all__ = [
    "FORMATS",
    "SPLITS",
    "DataFormat",
    "ImageSet",
    "ImageSource",
    "Request",
    "array_source",
    "open_images",
    "read_image",
]
