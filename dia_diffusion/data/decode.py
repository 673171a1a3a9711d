"""One encoded image -> uint8 pixels, RGB or grey, cropped to the centre square and resized.

EXIF orientation is applied, transparency is composited on white, palettes and CMYK become RGB, 16 bit greys are scaled
by 255/65535, of several frames the first is taken; colour profiles are not applied.
"""

import io
import stat
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dia_diffusion.data.image_set import Pixels
from dia_diffusion.errors import InputError, one_line

# Pillow reads many more formats, but each is code that a hostile file can reach.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
PIXEL_LIMIT = 1 << 26
"""An image that declares more pixels than this is refused before it is decoded."""
SIDE_LIMIT = 1 << 16
"""As is a longer one: Pillow keeps two addresses a row."""


def read_image(source: bytes | Path, name: str, *, size: int | None = None, channels: int = 3) -> Pixels:
    """Decodes one image file, given as its bytes or its path, to uint8 (H, W, C), 0..255.

    With `size` it is cropped to the centre square and resized to size x size.
    Raises InputError, naming `name`, where it can't be read.
    """
    try:
        data = source if isinstance(source, bytes) else read_file(source)
        return to_pixels(open_image(data), size, channels)
    except Exception as error:  # a corrupt file can raise almost anything inside a decoder
        raise InputError(f"{one_line(name)} can't be read ({reason(error)})") from error


def open_image(data: bytes) -> Image.Image:
    """The image in these bytes, upright; raises what Pillow raises, or ValueError for more than PIXEL_LIMIT pixels."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > PIXEL_LIMIT:
        raise ValueError(f"{image.width} x {image.height} is more than the {PIXEL_LIMIT} pixels accepted")
    if max(image.size) > SIDE_LIMIT:
        raise ValueError(f"{image.width} x {image.height} is longer than the {SIDE_LIMIT} pixels accepted")
    ImageOps.exif_transpose(image, in_place=True)
    return image


def to_pixels(image: Image.Image, size: int | None, channels: int) -> Pixels:
    """Crops to the centre square, resizes to size x size (None: as it is) and returns uint8 (H, W, C)."""
    image = _in_colour(image, "RGB" if channels == 3 else "L")
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
        return f"not an image of the formats {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(str(error)) or type(error).__name__


def _in_colour(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if image.mode == "F":
        raise ValueError("floating point pixels; 8 or 16 bits a channel are accepted")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32 bit pixels; 8 or 16 bits a channel are accepted")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


FILE_LIMIT = 1 << 28
"""An image file may hold this many bytes, in a zip after decompression."""


def read_file(path: Path) -> bytes:
    """An image file's bytes; ValueError for more than FILE_LIMIT of them, and for what is no regular file."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
        raise ValueError("not a regular file")
    with path.open("rb") as file:  # of a limit alone, all of it would be allocated for every file
        return bounded(file.read(min(status.st_size, FILE_LIMIT) + 1))


def bounded(data: bytes) -> bytes:
    """The bytes of an image file as they are, unless there are too many (ValueError)."""
    if len(data) > FILE_LIMIT:
        raise ValueError(f"more than the {FILE_LIMIT >> 20} MiB accepted for one image")
    return data


def stamp_of(path: Path) -> tuple[int, int]:
    """Two numbers that change when a file does."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0  # reading it will tell
    return status.st_size, status.st_mtime_ns
