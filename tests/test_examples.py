"""The scripts in examples/, with few steps."""

from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from attach_to_your_network import main as attach_to_your_network
from PIL import Image
from train_from_python import main as train_from_python

from dia_diffusion import UViTPipeline


def test_train_from_python(tmp_path: Path) -> None:
    losses = train_from_python(tmp_path, steps=60)
    assert mean(losses[-10:]) < 0.7 * mean(losses[:20])
    grid = np.asarray(Image.open(tmp_path / "digits.png"))
    assert grid.shape == (512, 512) and grid.std() > 20
    assert UViTPipeline.from_pretrained(tmp_path / "digits").unet.unit is not None


def test_attach_to_your_network(capsys: pytest.CaptureFixture[str]) -> None:
    losses = attach_to_your_network(steps=40)
    assert mean(losses[-5:]) < 0.7 * losses[0]
    assert "one unit for 4 insertion points of 32 channels" in capsys.readouterr().out
