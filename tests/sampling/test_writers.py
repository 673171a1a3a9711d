import numpy as np
import pytest
import torch
from PIL import Image

from dia_diffusion.errors import InputError
from dia_diffusion.sampling.writers import png_path, save_grid, save_npz, save_png


def random_images(count, channels=3, size=4):
    return torch.randint(
        0, 256, (count, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_are_named_by_seed_and_hold_the_pixels(channels, tmp_path):
    images = random_images(2, channels)
    for seed, image in zip((7, 123456789), images, strict=True):
        save_png(tmp_path, seed, image)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000007.png", "123456789.png"]
    with Image.open(png_path(tmp_path, 7)) as file:
        assert file.mode == ("L" if channels == 1 else "RGB")
        np.testing.assert_array_equal(np.asarray(file).reshape(4, 4, -1), images[0].permute(1, 2, 0).numpy())
    with pytest.raises(InputError, match="must have 1 or 3 channels, got 4"):
        save_png(tmp_path, 8, random_images(1, 4)[0])


def test_npz_is_in_order_of_seed_and_never_replaced(tmp_path):
    images = random_images(3)
    save_npz(tmp_path / "out.npz", [5, 2, 9], images)
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        assert arrays["seeds"].tolist() == [2, 5, 9]
        assert arrays["images"].dtype == np.uint8
        np.testing.assert_array_equal(arrays["images"], images[[1, 0, 2]].permute(0, 2, 3, 1).numpy())
    with pytest.raises(InputError, match=r"out\.npz exists"):
        save_npz(tmp_path / "out.npz", [1], images[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]


def test_grid_shows_each_image_enlarged_between_gray_lines(tmp_path):
    images = random_images(5, size=8)
    save_grid(images, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png")).transpose(2, 0, 1)  # 3 columns, 2 rows
    scale = gap = 21  # 512 / (3 * 8)
    pitch = 8 * scale + gap
    assert grid.shape == (3, 2 * pitch - gap, 3 * pitch - gap)
    for index in range(5):
        top, left = (index // 3) * pitch, (index % 3) * pitch
        cell = grid[:, top : top + 8 * scale, left : left + 8 * scale]
        expected = np.kron(images[index].numpy(), np.ones((1, scale, scale), dtype=np.uint8))
        np.testing.assert_array_equal(cell, expected)
    assert (grid[:, 8 * scale : pitch] == 96).all()
    assert (grid[:, pitch:, 2 * pitch :] == 96).all()


def test_grid_sizes(tmp_path):
    save_grid(random_images(6, channels=1, size=600), tmp_path / "large.png", columns=2)
    assert Image.open(tmp_path / "large.png").size == (1202, 1804)
    with pytest.raises(InputError, match="at least one"):
        save_grid(random_images(0), tmp_path / "none.png")
