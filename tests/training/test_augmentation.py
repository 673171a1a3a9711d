"""Augmentations compared with torchvision and with their documented behavior."""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as transforms

from dia_diffusion.training.augmentation import crop_box, cut_out, draw_images, mirrored, pad_cropped, resized_crop


def test_draws_belong_to_their_step_and_image() -> None:
    whole = draw_images(3, 5, 8, 100)
    part = whole.slice(2, 6)
    assert np.array_equal(part.indices, whole.indices[2:6]) and torch.equal(part.uniform, whole.uniform[2:6])
    assert torch.equal(draw_images(3, 5, 8, 100).uniform, whole.uniform)
    assert not torch.equal(draw_images(3, 6, 8, 100).uniform, whole.uniform)


def test_pad_crop_and_mirror_move_images_as_torchvision_does() -> None:
    images = torch.randint(0, 256, (40, 3, 8, 10), dtype=torch.uint8)
    uniform = torch.rand(40, 23)
    moved = pad_cropped(mirrored(images, uniform), uniform)
    for image, row, result in zip(images, uniform.tolist(), moved, strict=True):
        expected = transforms.hflip(image) if row[0] < 0.5 else image
        expected = transforms.crop(transforms.pad(expected, [4]), int(row[1] * 9), int(row[2] * 9), 8, 10)
        assert torch.equal(result, expected)


def test_reflected_shifts_and_cutouts_equal_a_loop_over_pixels() -> None:
    """For each pixel: whether it is hidden, and otherwise which source pixel it shows, reflected at the border."""

    def reflected(place: int, extent: int) -> int:
        return -place if place < 0 else 2 * (extent - 1) - place if place >= extent else place

    images = torch.randint(128, 256, (30, 3, 8, 10), dtype=torch.uint8)
    uniform = torch.rand(30, 25)
    uniform[:4, 23:] = torch.tensor([[0.0, 0.0], [0.0, 0.99], [0.99, 0.0], [0.99, 0.99]])
    found = cut_out(pad_cropped(mirrored(images, uniform), uniform, reflected=True), uniform, 4)
    for image, row, result in zip(images, uniform.tolist(), found, strict=True):
        down, right = int(row[1] * 9) - 4, int(row[2] * 9) - 4
        middle, centre = int(row[23] * 8), int(row[24] * 10)
        for y in range(8):
            for x in range(10):
                source = reflected(x + right, 10)
                shown = image[:, reflected(y + down, 8), 9 - source if row[0] < 0.5 else source].tolist()
                hidden = middle - 2 <= y < middle + 2 and centre - 2 <= x < centre + 2
                assert result[:, y, x].tolist() == ([127, 127, 127] if hidden else shown)


def test_resized_crops_are_spread_as_torchvisions() -> None:
    """Means of the rectangles' edges within five standard errors, standard deviations within 6 %."""
    draws, count = torch.rand(4000, 23, generator=torch.Generator().manual_seed(0)), 4000
    own = np.array([crop_box(80, 50, row) for row in draws])
    assert own.min() >= 0 and own[:, 2].max() <= 80 and own[:, 3].max() <= 50
    torch.manual_seed(0)
    blank = torch.zeros(1, 50, 80)
    theirs = np.array([RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)])
    top, left, height, width = theirs.T
    for mine, other in zip(own.T, (left, top, left + width, top + height), strict=True):
        assert abs(mine.mean() - other.mean()) < 5 * np.hypot(mine.std(), other.std()) / count**0.5
        assert abs(mine.std() / other.std() - 1) < 0.06


def test_an_image_too_long_for_any_try_is_cropped_in_the_middle() -> None:
    """As in torchvision: the largest rectangle with an allowed aspect ratio."""
    row = torch.ones(23) * 0.999  # the whole area with the widest aspect ratio
    top, left, height, width = RandomResizedCrop.get_params(torch.zeros(1, 10, 200), [0.99, 1.0], [3 / 4, 4 / 3])
    assert crop_box(200, 10, row) == (left, top, left + width, top + height)


def test_resized_crop_reads_the_rectangle() -> None:
    """If each pixel holds its x coordinate, the mean is the rectangle's middle."""
    across = np.broadcast_to(np.arange(200, dtype=np.uint8), (100, 200))
    image = Image.fromarray(np.stack([across] * 3, axis=2))
    for row in torch.rand(20, 23):
        left, _, right, _ = crop_box(200, 100, row)
        pixels = resized_crop(image, 32, row)
        assert pixels.shape == (3, 32, 32)
        assert abs(pixels.mean() - (left + right - 1) / 2) < 1
