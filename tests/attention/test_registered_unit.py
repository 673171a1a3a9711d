"""A unit that a program registers, without a change to the library, works wherever the library's own do."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from dia_diffusion import AttachedModel, UViT, attach
from dia_diffusion.analysis.parameters import Stage, added_parameters
from dia_diffusion.attention import UNITS, Unit, build_attention
from dia_diffusion.errors import InputError
from dia_diffusion.training.config import DataConfig, Experiment, ModelConfig, TrainConfig
from dia_diffusion.training.diffusion import train
from tests.models.test_attached import ARGUMENTS

SMALL = {"sample_size": 8, "in_channels": 1, "hidden_size": 16, "num_layers": 3, "num_attention_heads": 2}


class Gain(nn.Module):
    """Features times a learned scale per channel, plus `step` times the calls before; the state counts the calls."""

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
    """The same, plus the mean of the time embedding; the state is the number of calls and that mean."""

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
    added = added_parameters([Stage(8, 3), Stage(16, 2)], "test-gain")
    assert (added.shared, added.individual) == (8 + 16, None)


def test_in_a_uvit(tmp_path: Path) -> None:
    model = UViT(**SMALL, attention="test-gain").eval()
    for block in [*model.in_blocks, model.mid_block, *model.out_blocks]:  # what the unit does, done by each MLP
        block.carries_unit = False
    x = torch.randn(2, 1, 8, 8)
    outputs = []
    for scales in ((1.0, 1.5, 2.0), (1.0, 1.0, 1.0)):
        blocks = [model.in_blocks[0], model.mid_block, model.out_blocks[0]]
        hooks = [
            block.mlp.register_forward_pre_hook(lambda _, args, scale=scale: (args[0] * scale,))
            for block, scale in zip(blocks, scales, strict=True)
        ]
        outputs.append(model(x, 500).sample)
        for hook in hooks:
            hook.remove()
    model.save_pretrained(tmp_path)
    loaded = UViT.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(x, 500).sample, outputs[0])
    assert not torch.allclose(outputs[0], outputs[1])


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
    with pytest.raises(InputError, match="which only a UViT gives, got 'test-time-gain'"):
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
    experiment = Experiment(
        data=DataConfig("digits"),
        model=ModelConfig(**SMALL, attention="test-gain", attention_kwargs={"start": 0.5}),
        train=TrainConfig(max_steps=3, batch_size=8, checkpoint_every=3, sample_every=3),
        output=str(tmp_path / "run"),
    )
    train(experiment)
    pipelines = sorted((tmp_path / "run" / "pipelines").iterdir())
    loaded = UViT.from_pretrained(pipelines[-1] / "unet")
    assert isinstance(loaded.unit, Gain) and not loaded.unit.scale.eq(0.5).any()
