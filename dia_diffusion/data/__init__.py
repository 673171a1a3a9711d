"""Any image source -> uint8 images (N, C, H, W) and labels, by index."""

from dia_diffusion.data.decode import read_image
from dia_diffusion.data.image_set import ImageSet
from dia_diffusion.data.sources import SPLITS, open_images

__all__ = ["SPLITS", "ImageSet", "open_images", "read_image"]
