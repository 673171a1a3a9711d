"""Where units are inserted into known and other networks, and which places are refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from dia_diffusion import Position, attach
from dia_diffusion.errors import InputError
from tests.attention.networks import Network, is_branch, tiny_dit, tiny_unet, tiny_vit


def stages(model: nn.Module) -> list[tuple[int, list[str]]]:
    return [(stage.channels, [p.module for p in stage.positions]) for stage in attach(model).stages]


def test_places_of_known_networks() -> None:
    assert stages(tiny_unet()) == [
        (8, ["down_blocks.0.resnets.0"]),
        (16, ["down_blocks.1.resnets.0"] + [f"{b}.resnets.{i}" for b in ("mid_block", "up_blocks.0") for i in (0, 1)]),
        (8, ["up_blocks.1.resnets.0", "up_blocks.1.resnets.1"]),
    ]
    assert stages(tiny_dit()) == [(16, [f"transformer_blocks.{i}.ff" for i in range(3)])]
    vit = tiny_vit()
    assert stages(vit) == [(16, [f"encoder.layers.encoder_layer_{i}.mlp" for i in range(2)])]
    assert vit.attention_units.attachment.stages[0].positions[0].num_prefix_tokens == 1
    basic = ResNet(BasicBlock, [1, 2, 1, 1])
    assert stages(basic)[1] == (128, ["layer2.0.bn2", "layer2.1.bn2"])
    with torch.device("meta"):
        of_detector = stages(fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None))
    assert [(c, len(names)) for c, names in of_detector] == [(256, 3), (512, 4), (1024, 6), (2048, 3)]


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (tiny_vit, (torch.randn(2, 3, 8, 8),)),
        (lambda: ResNet(Bottleneck, [1, 1, 1, 1], groups=2, width_per_group=4), (torch.randn(2, 3, 32, 32),)),
        (tiny_dit, (torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 3]))),
    ],
)
def test_known_networks_train_with_a_unit(build: Callable[[], nn.Module], inputs: tuple[Tensor, ...]) -> None:
    model = build()
    attach(model, "cbam", reduction=8)
    output = model(*inputs)
    (output if isinstance(output, Tensor) else output.sample).sum().backward()
    assert all(p.grad is not None for p in model.attention_units.parameters())


@pytest.mark.parametrize(
    ("at", "error"),
    [
        (None, "in a Network, which has no known block"),
        ([], "empty list"),
        ("first", r"\(name, module\), got 'first'"),
        (3, r"\(name, module\), got 3"),
        ({"first.0.conv"}, r"\(name, module\), got \{'first.0.conv'\}"),
        (lambda name, module: False, "one of the 13 modules of Network, got none"),
        (["first.0.convs"], "got 'first.0.convs'; the nearest are first.0.conv"),
        (["first.0.conv", "first.0.conv"], "'first.0.conv' twice"),
        (
            ["first.0"],
            r"must be given for the output of 'first.0', a Block: pass Position\('first.0', 'output', channels=...\)",
        ),
        ([Position("first.0", "inside")], "must be one of input, output, got 'inside'"),
        ([3], "Positions, got 3"),
    ],
)
def test_unknown_places_are_refused(at: object, error: str) -> None:
    with pytest.raises(InputError, match=error):
        attach(Network(), at=at)


@pytest.mark.parametrize(
    ("at", "error"),
    [
        (["first.1.conv", "first.0.conv"], "got first.0.conv too early, where first.1.conv was next"),
        ([Position("first.0", channels=4)], "the output of first.0 must have 4 channels, as its unit, got 8"),
        (["unused"], "left out unused"),
        (["twice"], "got twice again, where"),
        (["pair"], r"the output of pair must have shape .*, got a tuple"),
    ],
)
def test_places_that_a_pass_does_not_run_as_declared_are_refused(at: list, error: str) -> None:
    class Odd(Network):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.twice, self.pair = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.LSTM(8, 8)
            self.pair.out_channels = 8

        def forward(self, x: Tensor) -> Tensor:
            self.pair(x.flatten(2))
            return super().forward(self.twice(self.twice(x)))

    model = Odd()
    attach(model, at=at)
    for _ in range(2):
        with pytest.raises(InputError, match=error):
            model(torch.randn(2, 8, 4, 2))


def test_a_sequential_does_not_run_the_units_as_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
    images = torch.randn(2, 3, 8, 8)
    plain = model(images)
    attachment = attach(model, "fixed-scale", at=["2"], scale=0.5)
    assert torch.equal(model(images), plain * 0.5)
    attachment.detach()
    assert torch.equal(model(images), plain)


def test_models_that_take_no_unit() -> None:
    model = Network()
    with pytest.raises(InputError, match="is set by attach"):
        attach(model, at=is_branch, num_blocks=3)
    with pytest.raises(InputError, match="None"):
        attach(model, None, is_branch)
    with pytest.raises(InputError, match="'none'"):
        attach(model, "none", is_branch)
    with pytest.raises(InputError, match="before it is wrapped, got a "):
        attach(torch.compile(model), at=is_branch)
    attach(model, at=is_branch)
    with pytest.raises(InputError, match="without attached units, got a Network with some"):
        attach(nn.Sequential(model), at=["0"])
    around = nn.Sequential(Network())
    attach(around, at=["0.first.0.conv"])
    with pytest.raises(InputError, match=r"without an attached unit, got first\.0\.conv"):
        attach(around[0], at=["first.0.conv"])
