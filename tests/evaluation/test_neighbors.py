"""Nearest reference images against known numbers, and the page of `fid --show`."""

import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dia_diffusion.cli.main import main
from dia_diffusion.evaluation.neighbors import find_neighbors


def test_copies_and_outliers() -> None:
    """Real images lie on a line at 1000, 1001, ...: each is exactly 1 from its nearest, despite cdist's rounding."""
    reference = torch.stack([torch.arange(1000.0, 1300.0), torch.zeros(300)], dim=1)
    samples = torch.tensor([[1200.0, 0.0], [1100.25, 0.0], [1299.0, 50.0]])
    found = find_neighbors(samples, reference, torch.device("cpu"))
    np.testing.assert_array_equal(found.nearest, [200, 100, 299])
    np.testing.assert_allclose(found.distances, [0, 0.25, 50], atol=1e-6)
    np.testing.assert_array_equal(found.percentiles, [0, 0, 100])
    np.testing.assert_allclose(found.sparsity, [2, 2.25, np.hypot(4, 50)], rtol=1e-6)


def test_the_page_shows_a_copy_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test digits, one of them replaced by a training digit."""
    from dia_diffusion.data import open_images
    from dia_diffusion.evaluation.features import build_features

    folder = tmp_path / "images"
    folder.mkdir()
    images = open_images("digits", split="test", channels=1).read(range(12))
    images[7] = open_images("digits", split="train", channels=1).read([345])[0]
    for index, image in enumerate(images):
        Image.fromarray(image[0]).save(folder / f"{index:02d}.png")
    monkeypatch.chdir(tmp_path)
    command = ["fid", str(folder), "--reference", "digits", "--features", "digits,digits", "--show", "8"]
    assert main(command) == 0
    (page,) = tmp_path.glob("show-images-digits-*.html")
    html = page.read_text()
    page.unlink()
    assert main(command) == 0 and page.read_text() == html  # the distance is already on record
    assert not list(tmp_path.glob("*.unfinished"))
    assert len((tmp_path / "evaluations.jsonl").read_text().splitlines()) == 1
    captions = re.findall("<figcaption>(.*?)</figcaption>", html)
    assert captions[0] == "image 7: 0.0000, 0 %"
    assert len(captions) == 8 + 2 + 2 and html.count("data:image/png") == 16 + 4
    assert "1 of 12 samples are at 0 %" in html
    assert "http" not in html
    first, second = re.findall('src="(data:[^"]*)"', html)[:2]
    assert first == second
    with urllib.request.urlopen(first) as file:
        shown = np.array(Image.open(file))
    np.testing.assert_array_equal(shown[:, :, 0], images[7, 0])

    digits = open_images("digits", split="train", channels=1)
    features, real = (
        build_features("digits").layers(torch.from_numpy(pixels))["features"]
        for pixels in (images, digits.read(range(len(digits))))
    )
    best_first = torch.cdist(features, real).sort(dim=1).values[:, 4].argsort().tolist()
    in_captions = [int(caption.split()[1][:-1]) for caption in captions[8:]]
    assert in_captions == [*best_first[:2], *best_first[:-3:-1]]


def test_statistics_have_no_images_to_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("s.npz", mu=np.zeros(64), sigma=np.eye(64))
    assert main(["fid", "digits", "--features", "digits", "--reference", "s.npz", "--show", "4"]) == 2
    assert "`--reference` must be images for --show, got s.npz, which holds statistics" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.jsonl"))
