"""Images that come as one uint8 array: numpy files and scikit-learn's digits."""

from pathlib import Path

import numpy as np

from dia_diffusion.data.image_set import Pixels
from dia_diffusion.data.undecoded import Undecoded, undecoded_array
from dia_diffusion.errors import InputError, one_line
from dia_diffusion.reading.archives import refuse_bomb

CLASS_LIMIT = 1 << 16  # as each class up to the highest has a name, and later an embedding


def numpy_file(path: Path) -> Undecoded:
    """A .npy file of uint8 (N, H, W, C) with 1 to 4 channels, or (N, H, W), as a memory map."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a broken header is evaluated as Python literals, and raises accordingly
        raise InputError(f"{path} can't be read as a numpy file ({one_line(str(error))})") from error
    return undecoded_array(str(path), _pixels(images, path))


def numpy_archive(path: Path) -> Undecoded:
    """A .npz file: uint8 `images` as `sample` writes them, or `arr_0` as ADM does, (N, H, W, C) or (N, H, W).

    Class numbers (N,) may come as `labels` or `arr_1`.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            refuse_bomb(archive.zip, path)
            images_name = next((name for name in ("images", "arr_0") if name in archive.files), None)
            labels_name = next((name for name in ("labels", "arr_1") if name in archive.files), None)
            if images_name is None:
                if {"mu", "sigma"} & set(archive.files):  # which ADM's archives of images have beside them
                    raise InputError(f"{path} holds statistics (mu, sigma) and no images")
                holds = one_line(", ".join(archive.files)) or "nothing"
                raise InputError(f"{path} holds {holds}; accepted: an .npz file with images, or arr_0")
            images = archive[images_name]
            labels = None if labels_name is None else archive[labels_name]
            if isinstance(images, bytes) or isinstance(labels, bytes):  # as numpy gives what is in no .npy format
                raise ValueError("its entries are no arrays")
    except InputError:
        raise
    except Exception as error:  # as above; objects among them, which only unpickling could read
        raise InputError(f"{path} can't be read as an .npz file ({one_line(str(error))})") from error
    pixels = _pixels(images, path)
    if labels is None:
        return undecoded_array(str(path), pixels)
    if labels.dtype.kind not in "iu" or labels.shape != (len(pixels),) or labels.min() < 0:
        raise InputError(
            f"{path} holds the labels {labels_name}, {labels.dtype} {labels.shape}; accepted: a class number an image"
        )
    if labels.max() >= CLASS_LIMIT:
        raise InputError(f"{path} holds the class {labels.max()} in {labels_name}; accepted: below {CLASS_LIMIT:,}")
    class_names = tuple(str(number) for number in range(int(labels.max()) + 1))
    return undecoded_array(str(path), pixels, labels.astype(np.int64), class_names)


def _pixels(images: np.ndarray, path: Path) -> Pixels:
    """Images (N, H, W, C); InputError for other arrays."""
    pixels = images[:, :, :, None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or pixels.ndim != 4 or not 1 <= pixels.shape[3] <= 4 or 0 in pixels.shape:
        accepted = "uint8 (N, H, W, C) with 1 to 4 channels, or (N, H, W)"
        raise InputError(f"{path} holds {images.dtype} {images.shape}; accepted: {accepted}")
    return pixels


def digits(split: str) -> Undecoded:
    """scikit-learn's 1797 handwritten digits, 8 x 8 grey, their values 0..16 scaled to 0..255.

    Of every class each third image, in the order of the data set, is held out as split "test"; the others are "train".
    """
    from sklearn.datasets import load_digits  # slow to import, and needed for these images alone

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, :, :, None]
    labels = data.target.astype(np.int64)
    rank_in_class = np.zeros_like(labels)
    for digit in range(10):
        rank_in_class[labels == digit] = np.arange(np.sum(labels == digit))
    chosen = (rank_in_class % 3 == 2) == (split == "test")
    class_names = tuple(str(digit) for digit in range(10))
    return undecoded_array("digits", images[chosen], labels[chosen], class_names, split)
