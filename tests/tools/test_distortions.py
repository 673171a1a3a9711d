import json

import numpy as np
import pytest
import torch
from distortions import Options, Row, blur, cases, draw_corrupted, jpeg, noise, run
from PIL import Image, ImageFilter

from dia_diffusion.cli.main import run_script
from dia_diffusion.data import open_images
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import build_features
from dia_diffusion.evaluation.reference import reference_statistics
from tests.security.hostile import write_bomb
from tests.tools.conftest import script_error


@pytest.fixture(scope="module")
def train():
    return open_images("digits", split="train")


@pytest.fixture
def smooth():
    """A color image with soft edges, (1, 3, 32, 32)."""
    generator = np.random.default_rng(0)
    small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)[None].copy()


def test_jpeg_loses_what_it_should(smooth):
    images = torch.from_numpy(smooth)
    errors = [(jpeg(images, quality, torch.Generator()).float() - images).square().mean() for quality in (95, 50, 10)]
    assert 0 < errors[0] < errors[1] < errors[2]
    # 8x8 blocks are independent: even with halved chroma, a change in one doesn't reach the second block after it.
    changed = images.clone()
    changed[..., :8, :8] = 0
    difference = jpeg(changed, 30, torch.Generator()).int() - jpeg(images, 30, torch.Generator()).int()
    assert difference[..., :8, :8].abs().max() > 20
    assert difference[..., 18:, 18:].abs().max() == 0
    assert jpeg(images[:, :1], 30, torch.Generator()).shape == (1, 1, 32, 32)


def test_blur_is_a_gaussian_of_its_deviation(smooth):
    spread = Image.fromarray(smooth[0].transpose(1, 2, 0)).filter(ImageFilter.GaussianBlur(1))
    expected = np.asarray(spread).transpose(2, 0, 1).astype(int)[:, 4:-4, 4:-4]
    found = blur(torch.from_numpy(smooth), 1, torch.Generator())[0].numpy().astype(int)[:, 4:-4, 4:-4]
    assert np.abs(found - expected).mean() < 3  # Pillow's is three box filters
    point = torch.zeros(1, 1, 33, 33, dtype=torch.uint8)
    point[..., 16, 16] = 255
    centre = blur(point, 1.5, torch.Generator())[0, 0, 16].double()
    # One row of the kernel: exp(-x^2 / (2 1.5^2)) relative to its peak, in whole gray levels.
    expected = centre[16] * torch.exp(-(torch.arange(-4.0, 5) ** 2) / (2 * 1.5**2))
    assert (centre[12:21] - expected).abs().max() <= 1


def test_noise_has_its_deviation_and_belongs_to_its_seed():
    gray = torch.full((50, 3, 16, 16), 128, dtype=torch.uint8)
    noisy = noise(gray, 16, torch.Generator().manual_seed(1))
    assert noisy.double().std() == pytest.approx(16, rel=0.02)
    assert torch.equal(noisy, noise(gray, 16, torch.Generator().manual_seed(1)))
    assert not torch.equal(noisy, noise(gray, 16, torch.Generator().manual_seed(2)))


def test_cases_are_what_they_say(train):
    by_name = {(case.name, case.amount): case for case in cases(train, 400, seed=3)}
    unchanged = by_name["unchanged", None]
    assert len(set(unchanged.indices)) == 400
    assert np.array_equal(by_name["blur, pixels", 1].indices, unchanged.indices)
    half = by_name["classes missing of 10", 5]
    assert set(train.labels[half.indices]) == set(range(5))
    assert len(set(half.indices)) == 400
    duplicates = by_name["duplicates, per cent", 90].indices
    assert (len(duplicates), len(set(duplicates))) == (400, 40)
    assert set(duplicates) <= set(unchanged.indices)
    with pytest.raises(InputError, match="must be 1 to 1201, the size of the source, got 2000"):
        cases(train, 2000)


def test_distance_rises_with_the_amount(train):
    extractor = build_features("digits")
    reference = reference_statistics(open_images("digits", split="test"), extractor).statistics
    found: dict[str, list[float]] = {}
    for case in cases(train, 500):
        found.setdefault(case.name, []).append(case.distance(extractor, reference))
    (unchanged,) = found.pop("unchanged")
    for name, distances in found.items():
        strong = [unchanged, *distances[-2:]]  # with 500 images, weak ones are within the spread over sets
        assert strong == sorted(strong), name
        assert strong[-1] > 2 * unchanged, name


def test_the_figure_shows_every_corruption(train, tmp_path):
    rows = [Row(case.name, case.amount, 10, [1.5]) for case in cases(train, 10)]
    draw_corrupted(train, rows, tmp_path / "corrupted.png")
    assert np.asarray(Image.open(tmp_path / "corrupted.png")).std() > 10


def test_script(tmp_path, monkeypatch, capsys):
    """Two choices of 20 digits; an invalid output file and an archive bomb are each refused in one line."""
    monkeypatch.setenv("DIA_DIFFUSION_CACHE", str(tmp_path / "cache"))
    reference = ["--reference", "digits", "--reference-split", "test"]
    out = ["--num", "20", "--seeds", "0-1", "--out", str(tmp_path / "x.json")]
    assert run_script("distortions.py", Options, run, ["digits", *reference, *out]) == 0
    assert "FD(digits)" in capsys.readouterr().out and (tmp_path / "x.png").is_file()
    numbers = json.loads((tmp_path / "x.json").read_text())
    assert {len(row["distances"]) for row in numbers["rows"]} == {2} and numbers["reference"]["count"] == 596
    bomb = write_bomb(tmp_path / "bomb.zip", "a.png", 1 << 26)
    for arguments, said in (
        (["digits", *reference, "--out", tmp_path / "z.png"], "ending in .json, got"),
        ([bomb, *reference, "--features", "digits"], "bomb.zip"),
    ):
        assert said in script_error("distortions.py", Options, run, arguments, capsys)
