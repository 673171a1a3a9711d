"""A backbone registered from outside the library: built, trained, saved and loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from dia_diffusion.errors import InputError
from dia_diffusion.models.factory import BACKBONES, build_model
from dia_diffusion.models.registry import Backbone
from dia_diffusion.models.uvit import UViTOutput
from dia_diffusion.training.config import ModelConfig
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.trainer import Trainer
from tests.models.test_attached import ARGUMENTS
from tests.training.conftest import TINY, Recorder


class Convolutions(ModelMixin, ConfigMixin):
    """Two convolutions with the time as an extra channel: a minimal backbone."""

    unit = None

    @register_to_config
    def __init__(self, sample_size: int, in_channels: int = 3, num_classes: int | None = None, width: int = 4):
        super().__init__()
        self.sample_size, self.in_channels, self.num_classes = sample_size, in_channels, num_classes
        self.first = nn.Conv2d(in_channels + 1, width, 3, padding=1)
        self.last = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Any, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UViTOutput | tuple[Tensor]:
        time = torch.as_tensor(timestep, device=sample.device).to(sample.dtype).expand(len(sample)) / 1000
        x = torch.cat([sample, time[:, None, None, None].expand(-1, 1, *sample.shape[2:])], dim=1)
        prediction = self.last(self.first(x).relu())
        return UViTOutput(sample=prediction) if return_dict else (prediction,)


BACKBONES.register("test-convolutions", Backbone(Convolutions))
NAME = {"backbone": "test-convolutions"}


def test_built_of_its_own_keys() -> None:
    torch.manual_seed(0)
    model = build_model({**NAME, "sample_size": 8, "width": 6})
    assert isinstance(model, Convolutions) and model.first.out_channels == 6
    torch.manual_seed(0)
    assert torch.equal(model.last.weight, Convolutions(8, width=6).last.weight)


def section(backbone: str, config: dict[str, Any]) -> dict[str, Any]:
    """A recipe's resolved `model:` section."""
    keys = {"backbone": backbone, **config}
    return read_experiment(None, keys={f"model.{key}": value for key, value in keys.items()}).to_dict()["model"]


def test_keys_of_other_backbones_are_ignored_at_their_defaults_only() -> None:
    older = {"sample_size": 8, "hidden_size": 512, "attention_at": None, "attention": "dia-lstm"}
    own = {"sample_size": 8, "in_channels": 3, "num_classes": None, "attention": "none", "attention_kwargs": None}
    assert section("test-convolutions", older) == {**NAME, **own, "width": 4}
    unet = {"backbone_kwargs": ARGUMENTS["unet2d"]}
    assert section("unet2d", {**unet, "patch_size": 2, "width": 4}) == section("unet2d", unet)
    assert section("uvit", {"backbone_kwargs": None, "patch_size": 4}) == section("uvit", {"patch_size": 4})


@pytest.mark.parametrize(
    ("backbone", "config", "error"),
    [
        ("unet3d", {}, "`model.backbone` must be one of uvit, unet2d, dit, .*got 'unet3d'"),
        ("test-convolutions", {"widht": 4}, "unknown key `model.widht`; did you mean `model.width`?"),
        ("test-convolutions", {"width": "4"}, "`model.width` must be a whole number, got '4'"),
        ("test-convolutions", {"attention": "se"}, "`model.attention` must be left out .*, got 'se'"),
        ("test-convolutions", {"hidden_size": 64}, "`model.hidden_size` must be left out .*, got 64"),
        ("uvit", {"attention_at": ["mid_block"]}, "`model.attention_at` must be left out for backbone uvit"),
        ("dit", {"num_layers": 5}, "`model.num_layers` must be left out for backbone dit, got 5"),
        ("unet2d", {"norm_type": "x"}, "unknown key `model.norm_type`; did you mean "),
    ],
)
def test_other_keys_are_refused(backbone: str, config: dict[str, Any], error: str) -> None:
    with pytest.raises(InputError, match=error):
        section(backbone, config)


def test_trained_saved_and_loaded(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TINY)
    experiment = read_experiment(str(recipe), ["--output", str(tmp_path / "run")])
    section = ModelConfig(**NAME, sample_size=8, in_channels=1)
    Trainer(experiment.model_copy(update={"model": section}), Recorder()).run()
    folder = max((tmp_path / "run" / "pipelines").iterdir())
    torch.manual_seed(0)
    loaded = Convolutions.from_pretrained(folder / "unet")
    assert loaded.config.in_channels == 1
    assert "# Convolutions, step 6" in (folder / "README.md").read_text()
