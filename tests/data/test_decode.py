import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dia_diffusion.data import read_image
from dia_diffusion.errors import InputError, one_line
from tests.security.hostile_images import encoded, png_of


def one_pixel(image: Image.Image, format: str = "PNG", channels: int = 3, **options) -> list[int]:
    return read_image(encoded(image, format, **options), "x", channels=channels)[0, 0].tolist()


def test_pixels_of_a_lossless_file_are_unchanged(pixels, tmp_path):
    data = encoded(Image.fromarray(pixels[0]))
    np.testing.assert_array_equal(read_image(data, "x"), pixels[0])
    (tmp_path / "x.png").write_bytes(data)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png", "x"), pixels[0])


def test_gray_and_rgb_become_each_other():
    assert one_pixel(Image.new("L", (2, 2), 77)) == [77, 77, 77]
    weights = 0.299 * 200 + 0.587 * 100 + 0.114 * 50  # ITU-R 601-2
    assert one_pixel(Image.new("RGB", (2, 2), (200, 100, 50)), channels=1) == [round(weights)]
    assert one_pixel(Image.new("1", (2, 2), 1)) == [255, 255, 255]


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_composited_on_white(format):
    options = {"lossless": True} if format == "WEBP" else {}
    image = Image.new("RGBA", (2, 2), (200, 100, 0, 51))
    expected = [round(255 + 51 / 255 * (value - 255)) for value in (200, 100, 0)]
    np.testing.assert_allclose(one_pixel(image, format, **options), expected, atol=1)


def test_gray_alpha_palettes_and_transparent_colors():
    assert one_pixel(Image.new("LA", (2, 2), (10, 0))) == [255, 255, 255]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert one_pixel(palette) == [10, 20, 30]
    assert one_pixel(palette, transparency=1) == [255, 255, 255]
    assert one_pixel(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3)) == [255, 255, 255]
    assert one_pixel(Image.new("L", (2, 2), 9), transparency=9) == [255, 255, 255]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grays_are_scaled(format):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    gray = read_image(encoded(Image.fromarray(values), format), "x", channels=1)
    assert gray[0, :, 0].tolist() == [0, 1, 128, 255]


def test_32_bit_and_floating_point_are_refused():
    for image in (Image.fromarray(np.array([[70000]], dtype=np.int32)), Image.fromarray(np.ones((1, 1), np.float32))):
        with pytest.raises(InputError, match=r"x can't be read .*8 or 16 bits"):
            read_image(encoded(image, "TIFF"), "x")


def test_cmyk_is_converted():
    assert one_pixel(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF") == [255, 0, 0]
    np.testing.assert_allclose(one_pixel(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), [255, 0, 0], atol=3)


def test_exif_orientation_is_applied(pixels):
    exif = Image.Exif()
    exif[0x0112] = 6  # needs a clockwise rotation
    data = encoded(Image.fromarray(pixels[0, :4]), exif=exif)
    np.testing.assert_array_equal(read_image(data, "x"), np.rot90(pixels[0, :4], -1))


def test_the_first_of_several_frames_is_taken():
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    assert one_pixel(frames[0], "GIF", save_all=True, append_images=frames[1:]) == [255, 0, 0]


def test_crop_alone_is_the_centre_square():
    wide = np.random.default_rng(0).integers(0, 256, (8, 13, 3), dtype=np.uint8)
    np.testing.assert_array_equal(read_image(encoded(Image.fromarray(wide)), "x", size=8), wide[:, 2:10])
    tall = wide.transpose(1, 0, 2)
    np.testing.assert_array_equal(read_image(encoded(Image.fromarray(tall)), "x", size=8), tall[2:10])


def resampling_matrix(old: int, new: int, kernel, support: float) -> np.ndarray:
    """(new, old): the kernel, stretched when shrinking, at the distances between the pixels' centers."""
    scale = max(1.0, old / new)
    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new
        for j in range(old):
            distance = (j + 0.5 - centre) / scale
            matrix[i, j] = kernel(distance) if abs(distance) < support else 0.0
    return matrix / matrix.sum(1, keepdims=True)


def lanczos(x: float) -> float:
    return 1.0 if x == 0 else 3 * math.sin(math.pi * x) * math.sin(math.pi * x / 3) / (math.pi * x) ** 2


def bicubic(x: float, a: float = -0.5) -> float:
    x = abs(x)
    return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x < 1 else a * (x**3 - 5 * x**2 + 8 * x - 4)


@pytest.mark.parametrize(
    ("old", "new", "kernel", "support"), [(32, 16, lanczos, 3), (23, 9, lanczos, 3), (8, 20, bicubic, 2)]
)
def test_resize_is_antialiased_lanczos_and_bicubic(old, new, kernel, support):
    image = np.random.default_rng(1).integers(60, 190, (old, old, 3), dtype=np.uint8)
    matrix = resampling_matrix(old, new, kernel, support)
    expected = np.einsum("ih,jw,hwc->ijc", matrix, matrix, image.astype(float)).clip(0, 255)
    resized = read_image(encoded(Image.fromarray(image)), "x", size=new)
    assert np.abs(resized - expected).max() < 1.6  # Pillow rounds after each of two passes


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_more_pixels_than_the_limit_are_refused_before_decoding(side):
    with pytest.raises(InputError, match="pixels"):
        read_image(png_of(side, side), "huge.png")


def test_a_file_that_is_no_image_is_named():
    with pytest.raises(InputError, match=r"^dog\.png can't be read \(not an image of the formats PNG, JPEG") as error:
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n", "dog.png")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_truncated_image_is_named(pixels, format):
    data = encoded(Image.fromarray(np.tile(pixels[0], (9, 9, 1))), format)
    with pytest.raises(InputError, match=r"^cut can't be read \("):
        read_image(data[: len(data) * 2 // 3], "cut")


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"^gone can't be read \(No such file"):
        read_image(Path("/nowhere/gone.png"), "gone")


def test_foreign_text_is_one_printable_line():
    assert one_line("a\nb\x1b[31m") == "'a b\\x1b[31m'"
    assert len(one_line("x" * 10_000)) < 320
