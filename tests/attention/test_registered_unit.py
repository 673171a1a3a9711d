"""A unit registered from outside the library works wherever the built-in units do."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from dia_diffusion import AttachedModel, UViT, attach
from dia_diffusion.analysis.parameters import added_parameters
from dia_diffusion.analysis.stages import Stage
from dia_diffusion.attention import UNITS, Unit, build_attention
from dia_diffusion.errors import InputError
from dia_diffusion.sampling.load import load_pipeline
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.trainer import Trainer
from tests.models.test_attached import ARGUMENTS
from tests.training.conftest import Recorder

SMALL = {"sample_size": 8, "in_channels": 1, "hidden_size": 16, "num_layers": 3, "num_attention_heads": 2}
RECIPE = """
data: {source: digits}
model: {sample_size: 8, in_channels: 1, patch_size: 4, hidden_size: 16, num_layers: 3, num_attention_heads: 2,
        attention: test-gain, attention_kwargs: {start: 0.5}}
train: {batch_size: 8, max_steps: 3, mixed_precision: none, checkpoint_every: 3, sample_every: 0}
optimizer: {learning_rate: 1.0e-2, warmup_steps: 1}
ema: {decay: 0.0}
"""


class Gain(nn.Module):
    """Features times a learned scale per channel plus `step` times the number of earlier calls, which is the state."""

    def __init__(self, channels: int, step: float = 0.0, start: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), start))
        self.step = step

    def forward(
        self, features: Tensor, state: int | None = None, unpooled: int = 0, prefix: int = 0
    ) -> tuple[Tensor, int]:
        calls = state or 0
        scale = self.attention_map(calls + 1)
        return features * (scale[:, None, None] if features.dim() == 4 else scale), calls + 1

    def attention_map(self, state: int) -> Tensor:
        return self.scale + self.step * (state - 1)


class TimeGain(Gain):
    """Features times a learned scale per channel plus the mean of the time embedding, which is the state."""

    def first_state(self, embedding: Tensor) -> Tensor:
        return embedding.mean(dim=1)[:, None, None]

    def forward(self, features: Tensor, state: Tensor, unpooled: int = 0, prefix: int = 0) -> tuple[Tensor, Tensor]:
        return features * (self.scale + state), state


UNITS.register("test-gain", Unit(Gain, {"step": 0.5}))
UNITS.register("test-time-gain", Unit(TimeGain, needs_time=True))


def test_it_is_built_by_name() -> None:
    unit = build_attention("test-gain", 8, num_blocks=3, start=2.0)
    assert isinstance(unit, Gain) and unit.step == 0.5 and unit.scale.eq(2).all()
    with pytest.raises(InputError, match="`step` is set by attention unit 'test-gain'"):
        build_attention("test-gain", 8, step=1.0)
    added = added_parameters([Stage(8, ("1", "2", "3")), Stage(16, ("1", "2"))], "test-gain")
    assert (added.shared, added.individual) == (8 + 16, None)


def test_in_a_uvit_each_mlp_is_given_what_the_unit_returns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 1, 8, 8)
    model = UViT(**SMALL, attention="test-gain").eval()
    plain = UViT(**SMALL, attention="none").eval()
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "unit" not in name})
    for block, scale in zip([plain.in_blocks[0], plain.mid_block, plain.out_blocks[0]], (1.0, 1.5, 2.0), strict=True):
        block.mlp.register_forward_pre_hook(lambda _, args, scale=scale: (args[0] * scale,))
    model.save_pretrained(tmp_path)
    loaded = UViT.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(model(x, 500).sample, plain(x, 500).sample)
    assert torch.equal(loaded(x, 500).sample, model(x, 500).sample)


def test_the_time_is_given_to_a_unit_that_needs_it() -> None:
    model = UViT(**SMALL, attention="test-time-gain", attention_kwargs={"start": 0.0})
    given: list[Tensor] = []
    model.mid_block.mlp.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    model.mid_block.norm2.register_forward_hook(lambda _, args, output: given.append(output))
    model(torch.randn(2, 1, 8, 8), torch.tensor([3.0, 800.0]))
    frequencies = 10000.0 ** (-torch.arange(8) / 8)
    angles = torch.tensor([3.0, 800.0])[:, None] * frequencies
    mean = torch.cat([angles.cos(), angles.sin()], dim=1).mean(dim=1)
    torch.testing.assert_close(given[1], given[0] * mean[:, None, None])
    with pytest.raises(InputError, match="which only a UViT gives its unit, got 'test-time-gain'"):
        attach(UNet2DModel(sample_size=8, **ARGUMENTS["unet2d"]), "test-time-gain")


def test_attached_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **ARGUMENTS["unet2d"]).eval()
    attachment = attach(network, "test-gain", start=0.5)
    assert [len(stage.unit.scale) for stage in attachment.stages] == [8, 16, 8]
    network.save_pretrained(tmp_path)
    loaded = AttachedModel.from_pretrained(tmp_path).eval()
    x, timestep = torch.randn(2, 1, 8, 8), torch.tensor([5, 5])
    assert torch.equal(loaded(x, timestep).sample, network(x, timestep).sample)


def test_trained_by_a_recipe_that_names_it(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    experiment = read_experiment(str(recipe), ["--output", str(tmp_path / "run")])
    Trainer(experiment, Recorder()).run()
    pipeline = load_pipeline(tmp_path / "run")
    assert isinstance(pipeline.unet.unit, Gain) and not pipeline.unet.unit.scale.eq(0.5).any()
    (image,) = pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 8, 8) and image.isfinite().all()
