"""Images that declare data they don't hold, or that decompress to far more than their size."""

import io
import pickle
import struct
import zlib
from functools import cache
from typing import Any

from PIL import Image


def png(size: tuple[int, int] = (8, 8), color: int = 7) -> bytes:
    return encoded(Image.new("RGB", size, (color, color, color)))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(
    width: int, height: int, depth: int = 8, color: int = 0, data: bytes = b"\0" * 100, extra: bytes = b""
) -> bytes:
    """A PNG that declares this size, whatever its data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@cache
def zeros(size: int) -> bytes:
    """`size` zeros, compressed."""
    packer = zlib.compressobj(9)
    block = bytes(1 << 24)
    parts = [packer.compress(block) for _ in range(size // len(block))]
    return b"".join([*parts, packer.flush()])


def bmp_of(width: int, height: int, bits: int = 24) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 16, 0, 0, 54) + header + bytes(16)


@cache
def images() -> dict[str, bytes]:
    """Files named .png that must not be decoded, keyed by what is wrong with them."""
    good = png()
    jpeg = encoded(Image.new("RGB", (64, 64), "red"), "JPEG")
    bomb = zeros(1 << 28)
    text = b"Comment\0\0" + bomb
    gif = encoded(Image.new("P", (4, 4)), "GIF")
    tiff = encoded(Image.new("RGB", (8, 8)), "TIFF")
    return {
        "empty": b"",
        "signature": good[:8],
        "header alone": good[:33],
        "truncated png": good[:50],
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "wide": png_of(60_000_000, 1),
        "tall": png_of(1, 60_000_000),
        "huge": png_of(60_000, 60_000),
        "largest": png_of((1 << 31) - 1, (1 << 31) - 1),
        "zero width": png_of(0, 8),
        "zero height": png_of(8, 0),
        "negative": png_of((1 << 32) - 1, 8),
        "pixels from nothing": png_of(8000, 8000, data=b""),
        "wrong depth": png_of(8, 8, depth=3),
        "wrong color": png_of(8, 8, color=9),
        "palette without one": png_of(8, 8, color=3, data=b""),
        "text bomb": png_of(8, 8, extra=chunk(b"zTXt", text)),
        "profile bomb": png_of(8, 8, extra=chunk(b"iCCP", b"icc\0\0" + bomb), data=b""),
        "chunk past the end": good[:8] + struct.pack(">I", 0x7FFFFFFF) + b"IDAT" + b"x",
        "negative bmp": bmp_of(-8, 8),
        "huge bmp": bmp_of(100_000, 100_000),
        "bmp of no rows": bmp_of(8, -(1 << 31)),
        "ppm of no end": b"P6 99999999 99999999 255\n",
        "ppm of digits": b"P6 " + b"9" * 5000 + b" 1 255\n",
        "ppm comment": b"P6 #" + b"x" * (1 << 20),
        "huge gif": gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:],
        "tiff within itself": tiff[:4] + struct.pack("<I", 4) + tiff[8:],
        "tiff cut short": tiff[: len(tiff) // 2],
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "html": b"<html><script>alert(1)</script>",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
        "pdf": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
        "pickle": pickle.dumps([1, 2]),
        "zip": b"PK\x03\x04" + bytes(40),
        "webp header": b"RIFF\xff\xff\xff\xffWEBPVP8 " + b"\xff" * 40,
        "dds": b"DDS " + bytes(124),
        "icns": b"icns" + struct.pack(">I", 0x7FFFFFFF),
        "psd": b"8BPS\0\1" + bytes(20),
        "text": b"hello",
    }
