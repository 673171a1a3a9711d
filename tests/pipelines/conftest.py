import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from dia_diffusion import UViT, UViTPipeline
from dia_diffusion.io import write_json
from dia_diffusion.noise import NoiseProcess
from tests.pipelines import hub as hub_stand_in

SMALL = {"sample_size": 8, "patch_size": 4, "hidden_size": 16, "num_layers": 3, "num_attention_heads": 2}
RECIPE = {
    "output": "/home/someone/runs/secret",
    "seed": 0,
    "data": {"source": "/home/someone/photos.zip", "label_dropout": 0.0},
    "train": {"batch_size": 8},
    "samples": {"count": 4},
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_stand_in.Hub]:
    """A fake Hub that huggingface_hub uses in place of the real one, with a token that it accepts."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_TOKEN", hub_stand_in.TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with hub_stand_in.serve() as served:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.address)
        yield served


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Saves a pipeline with random weights as a folder."""

    def save_pipeline(
        name: str, scheduler: object | None = None, prediction_type: str | None = None, **kwargs: object
    ) -> Path:
        torch.manual_seed(0)
        config = NoiseProcess().scheduler_config()
        unet = UViT(**{"attention": "dia-lstm", **SMALL, **kwargs}).eval()
        torch.nn.init.normal_(unet.decoder.weight, std=0.5)  # so that images differ from noise and from each other
        scheduler = scheduler or DPMSolverMultistepScheduler(**config)
        UViTPipeline(unet, scheduler, prediction_type).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save_pipeline


def contents(folder: Path) -> dict[str, bytes]:
    """The contents of all files below the folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def add_training(folder: Path) -> None:
    """Makes a saved pipeline look like one that a run on someone's machine wrote."""
    model = json.loads((folder / "unet" / "config.json").read_text())
    training = {"run": "secret", "step": 6, "images": 48, "weights": "ema"}
    training |= {"recipe": {**RECIPE, "model": model}, "data": {"name": "photos.zip", "count": 20}}
    write_json(folder / "training.json", training)
    (folder / "samples.png").write_bytes(b"\x89PNG not really")
