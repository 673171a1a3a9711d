"""Images that come as one uint8 array: numpy files and scikit-learn's digits."""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from dia_diffusion.data.decode import one_line
from dia_diffusion.data.undecoded import Undecoded, undecoded_array
from dia_diffusion.errors import InputError


def numpy_file(path: Path) -> Undecoded:
    """A .npy file of uint8 (N, H, W, C) with 1 to 4 channels, or (N, H, W), as a memory map."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a broken header is evaluated as Python literals, and raises accordingly
        raise InputError(f"{path} can't be read as a numpy file ({one_line(str(error))})") from error
    pixels = images[:, :, :, None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or pixels.ndim != 4 or not 1 <= pixels.shape[3] <= 4 or 0 in pixels.shape:
        accepted = "uint8 (N, H, W, C) with 1 to 4 channels, or (N, H, W)"
        raise InputError(f"{path} holds {images.dtype} {images.shape}; accepted: {accepted}")
    return undecoded_array(str(path), pixels)


def digits(split: str) -> Undecoded:
    """scikit-learn's 1797 handwritten digits, 8 x 8 grey, their values 0..16 scaled to 0..255.

    Of every class each third image, in the order of the data set, is held out as split "test"; the others are "train".
    """
    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, :, :, None]
    labels = data.target.astype(np.int64)
    rank_in_class = np.zeros_like(labels)
    for digit in range(10):
        rank_in_class[labels == digit] = np.arange(np.sum(labels == digit))
    chosen = (rank_in_class % 3 == 2) == (split == "test")
    return undecoded_array("digits", images[chosen], labels[chosen], tuple(str(digit) for digit in range(10)))
