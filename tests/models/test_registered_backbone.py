"""A backbone that a program registers, without a change to the library: built, trained, saved and loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from dia_diffusion.errors import InputError
from dia_diffusion.models.factory import BACKBONES, build_model, model_arguments
from dia_diffusion.models.registry import Backbone
from dia_diffusion.models.uvit import UViTOutput
from dia_diffusion.training.config import Experiment, ModelConfig
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.trainer import Trainer
from tests.models.test_attached import ARGUMENTS
from tests.training.conftest import TINY, Recorder


class Convolutions(ModelMixin, ConfigMixin):
    """Two convolutions with the time as an extra channel; the least that a backbone needs."""

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


def test_keys_of_other_backbones_are_ignored_at_their_defaults_only() -> None:
    older = {"sample_size": 8, "hidden_size": 512, "attention_at": None, "attention": "dia-lstm"}
    assert model_arguments("test-convolutions", {**NAME, **older}) == {"sample_size": 8}
    unet = {"backbone": "unet2d", "backbone_kwargs": ARGUMENTS["unet2d"], "patch_size": 2, "width": 4}
    assert model_arguments("unet2d", unet) == {"backbone": "unet2d", "backbone_kwargs": ARGUMENTS["unet2d"]}
    assert model_arguments("uvit", {"backbone": "uvit", "backbone_kwargs": None, "patch_size": 4}) == {"patch_size": 4}


@pytest.mark.parametrize(
    ("backbone", "config", "error"),
    [
        ("unet3d", {}, "`model.backbone` must be one of uvit, unet2d, dit, .*got 'unet3d'"),
        ("test-convolutions", {"widht": 4}, "`model.widht` is no key of backbone test-convolutions; .* width"),
        ("test-convolutions", {"width": 4}, "`model.sample_size` must be given for backbone test-convolutions"),
        ("test-convolutions", {"hidden_size": 64}, "`model.hidden_size` must be left out .*, got 64"),
        ("uvit", {"attention_at": ["mid_block"]}, "`model.attention_at` must be left out for backbone uvit"),
        ("dit", {"num_layers": 5}, "`model.num_layers` must be left out for backbone dit, got 5"),
        ("unet2d", {"norm_type": "x"}, "`model.norm_type` is no key of backbone unet2d"),
    ],
)
def test_other_keys_are_refused(backbone: str, config: dict[str, Any], error: str) -> None:
    with pytest.raises(InputError, match=error):
        model_arguments(backbone, config)


def test_trained_saved_and_loaded(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TINY)
    experiment: Experiment = read_experiment(str(recipe), ["--output", str(tmp_path / "run")])
    experiment.model = ModelConfig(**NAME, sample_size=8, in_channels=1)
    Trainer(experiment, Recorder()).run()
    folder = max((tmp_path / "run" / "pipelines").iterdir())
    torch.manual_seed(0)
    loaded = Convolutions.from_pretrained(folder / "unet")
    assert loaded.config.in_channels == 1
    assert "# Convolutions, step 6" in (folder / "README.md").read_text()
