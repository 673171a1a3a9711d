"""One encoded image -> uint8 pixels, RGB or gray, cropped to the center square and resized.

EXIF orientation is applied, transparency is composited on white, palettes and CMYK become RGB, 16 bit gray is scaled
by 255/65535, and only the first of several frames is used; color profiles are not applied.
"""

import io
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from dia_diffusion.errors import InputError, one_line

Pixels = npt.NDArray[np.uint8]

# Pillow reads many more formats, but each is code that a hostile file can reach.
PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
PIXEL_LIMIT = 1 << 26
"""Pixels that an image may declare; larger ones are refused before they are decoded."""
SIDE_LIMIT = 1 << 16
"""Maximum pixels of the longer side; Pillow keeps two addresses per row."""
FILE_LIMIT = 1 << 28
"""Maximum bytes of an image file; in a zip, after decompression."""


def read_image(source: bytes | Path, name: str, *, size: int | None = None, channels: int = 3) -> Pixels:
    """Decodes one image file, given as its bytes or its path, to uint8 (H, W, C), 0..255.

    Args:
        name: for error messages.
        size: crop to the center square and resize to size x size.
        channels: 3 for RGB, 1 for gray.

    Raises:
        InputError: it can't be read.
    """
    try:
        data = source if isinstance(source, bytes) else read_file(source)
        return to_pixels(open_image(data), size, channels)
    except Exception as error:  # a corrupt file can raise almost anything inside a decoder
        raise InputError(f"{one_line(name)} can't be read ({reason(error)})") from error


def open_image(data: bytes) -> Image.Image:
    """The image in these bytes, upright; raises what Pillow raises, or ValueError for more than PIXEL_LIMIT pixels."""
    image = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
    if image.width * image.height > PIXEL_LIMIT:
        raise ValueError(f"must have at most {PIXEL_LIMIT} pixels, got {image.width} x {image.height}")
    if max(image.size) > SIDE_LIMIT:
        raise ValueError(f"sides must have at most {SIDE_LIMIT} pixels, got {image.width} x {image.height}")
    ImageOps.exif_transpose(image, in_place=True)
    return image


def to_pixels(image: Image.Image, size: int | None, channels: int) -> Pixels:
    """uint8 (H, W, C) of the center square, resized to size x size (None: of the whole image, unchanged)."""
    image = _in_mode(image, "RGB" if channels == 3 else "L")
    side = min(image.size)
    if size is not None and image.size != (size, size):
        left, top = (image.width - side) // 2, (image.height - side) // 2
        # Pillow widens its filters when it shrinks, so this is antialiased.
        filter = Image.Resampling.LANCZOS if side > size else Image.Resampling.BICUBIC
        image = image.resize((size, size), filter, box=(left, top, left + side, top + side))
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def reason(error: Exception) -> str:
    """Why an image couldn't be read, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return f"not an image of the formats {', '.join(PILLOW_FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(str(error)) or type(error).__name__


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if image.mode == "F":
        raise ValueError("must have 8 or 16 bits per channel, got floating point")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("must have 8 or 16 bits per channel, got 32")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def read_file(path: Path) -> bytes:
    """An image file's bytes; ValueError for more than FILE_LIMIT of them, or if it isn't a regular file."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would block
        raise ValueError("not a regular file")
    with path.open("rb") as file:  # read(FILE_LIMIT) would allocate all of it for every file
        return bounded(file.read(min(status.st_size, FILE_LIMIT) + 1))


def bounded(data: bytes) -> bytes:
    """The bytes of an image file, unchanged; ValueError for more than FILE_LIMIT."""
    if len(data) > FILE_LIMIT:
        raise ValueError(f"must have at most {FILE_LIMIT >> 20} MiB")
    return data


def stamp_of(path: Path) -> tuple[int, int]:
    """Two numbers that change when a file does."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0  # reading it raises the error
    return status.st_size, status.st_mtime_ns
