"""Units attached by hooks give what networks give that are written with the unit in place."""

import copy
import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from dia_diffusion import Position, attach
from dia_diffusion.attention.attach import attachment_in
from dia_diffusion.errors import InputError

UNITS = [("dia-lstm", {}), ("se", {"sharing": "individual"}), ("cbam", {})]


class Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.relu())


class Network(nn.Module):
    """Two stages of residual blocks, 8 and 16 wide; `unit_of` is how the units are written in place, for reference."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(Block(8) for _ in range(3))
        self.widen = nn.Conv2d(8, 16, 1)
        self.second = nn.ModuleList(Block(16) for _ in range(2))
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpointed:
            return self.part(self.second, self.widen(self.part(self.first, x)))
        x = checkpoint(self.part, self.first, x, use_reentrant=False)
        return checkpoint(self.part, self.second, self.widen(x), use_reentrant=False)

    def part(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x)
        return x.tanh()

    def written_out(self, x: Tensor, units: list[nn.Module]) -> Tensor:
        for blocks, unit in zip([self.first, self.second], units, strict=True):
            x = x if blocks is self.first else self.widen(x)
            state = None
            for block in blocks:
                branch, state = unit(F.conv2d(x.relu(), block.conv.weight, block.conv.bias, padding=1), state)
                x = x + branch
            x = x.tanh()
        return x


def is_branch(name: str, module: nn.Module) -> bool:
    return name.endswith(".conv")


def gradients(model: nn.Module, *losses: Tensor) -> Tensor:
    """Of the sum, each taken by a backward pass of its own."""
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def tiny_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
    )


def tiny_dit() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(2, 8, in_channels=1, num_layers=3, sample_size=8, patch_size=2, num_embeds_ada_norm=3)


def tiny_vit() -> VisionTransformer:
    return VisionTransformer(8, 4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3)


@pytest.mark.parametrize(("unit", "kwargs"), UNITS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_outputs_and_gradients_are_those_of_the_network_written_out(
    unit: str, kwargs: dict, checkpointed: bool
) -> None:
    torch.manual_seed(0)
    model = Network().double()
    attached = attach(model, unit, is_branch, reduction=4, **kwargs)
    model.checkpointed = checkpointed
    first, second = torch.randn(2, 3, 8, 4, 4, dtype=torch.float64)

    # Two forward passes before their backward passes, in both orders.
    for order in (1, -1):
        outputs = [model(first), model(second)]
        found = gradients(model, *[output.square().sum() for output in outputs][::order])
        expected = [model.written_out(x, list(attached.units)) for x in (first, second)]
        torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found, gradients(model, *[output.square().sum() for output in expected]))


def test_frozen_weights_and_a_loss_on_features_are_recomputed_right() -> None:
    torch.manual_seed(0)
    model = Network().double()
    attached = attach(model, at=is_branch)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    model.first.requires_grad_(False)
    features: list[Tensor] = []
    model.widen.register_forward_hook(lambda module, args, output: features.append(args[0]))
    results = []
    for model.checkpointed in (False, True):
        features.clear()
        model(x)  # its output is dropped, and with it the graph's end
        gc.collect()
        results.append(gradients(attached.units[0], features[0].square().sum()))
    torch.testing.assert_close(*results)


def test_states_kept_for_recomputation_go_with_the_graph() -> None:
    model = Network()
    attached = attach(model, at=is_branch)
    model.checkpointed = True
    for _ in range(3):
        output = model(torch.randn(2, 8, 4, 4))
    gc.collect()
    assert len(attached.passes.kept) == 1
    output.sum().backward()
    del output
    gc.collect()
    assert len(attached.passes.kept) == 0
    with torch.no_grad():
        model(torch.randn(2, 8, 4, 4))
    assert len(attached.passes.kept) == 0


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("build", [tiny_unet, tiny_dit])
def test_diffusers_checkpointing_gives_the_same_gradients(build: Callable[[], nn.Module], when: str) -> None:
    torch.manual_seed(0)
    model = build().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)  # a DiT's first output is 0 whatever its blocks do
    twin = copy.deepcopy(model)
    attach(twin)
    if when == "before":
        model.enable_gradient_checkpointing()
        attach(model)
    else:
        attach(model)
        model.enable_gradient_checkpointing()
    model.attention_units.load_state_dict(twin.attention_units.state_dict())
    inputs = torch.randn(2, 1, 8, 8).double(), torch.tensor([3, 500])
    labels = {} if build is tiny_unet else {"class_labels": torch.tensor([0, 2])}
    model.eval(), twin.eval()  # a DiT drops labels at random while it trains
    results = [gradients(m, m(*inputs, **labels).sample.square().sum()) for m in (model, twin)]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_reentrant_checkpointing_is_refused() -> None:
    class Reentrant(Network):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.part, self.first, x.requires_grad_(), use_reentrant=True)

    model = Reentrant()
    attach(model, at=["first.0.conv", "first.1.conv", "first.2.conv"])
    with pytest.raises(InputError, match=r"first.0.conv runs without gradients.*use_reentrant=False"):
        model(torch.randn(2, 8, 4, 4))


def test_a_checkpoint_around_the_whole_model_starts_anew() -> None:
    torch.manual_seed(0)
    model = Network().double()
    attached = attach(model, at=is_branch)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    found = gradients(model, checkpoint(model, x, use_reentrant=False).square().sum())
    expected = gradients(model, model.written_out(x, list(attached.units)).square().sum())
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_models_give_the_same_gradients(checkpointed: bool) -> None:
    torch.manual_seed(0)
    model = tiny_dit().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    attach(model)
    if checkpointed:
        model.enable_gradient_checkpointing()
    compiled = torch.compile(model, backend="aot_eager")
    inputs = [(torch.randn(2, 1, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 2])) for _ in range(2)]
    torch._dynamo.reset()
    results = [
        gradients(model, *[network(*given).sample.square().sum() for given in inputs]) for network in (compiled, model)
    ]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    if not checkpointed:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "one graph, whole, for every pass"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def test_detaching_restores_function_and_names() -> None:
    model = tiny_unet()
    names, x = list(model.state_dict()), (torch.randn(1, 1, 8, 8), 5)
    before = model(*x).sample
    attached = attach(model)
    assert not torch.equal(model(*x).sample, before)
    assert len(model.state_dict()) > len(names)
    attached.detach()
    assert torch.equal(model(*x).sample, before) and list(model.state_dict()) == names
    assert "save_pretrained" not in vars(model)
    attach(model).detach()


def test_a_copy_is_independent() -> None:
    model = Network()
    attached = attach(model, at=is_branch)
    copied = copy.deepcopy(model)
    x = torch.randn(2, 8, 4, 4)
    expected = model(x)
    for parameter in copied.attention_units.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(model(x), expected) and not torch.equal(copied(x), expected)
    theirs = attachment_in(copied)
    assert theirs is not None and theirs is not attached and theirs.model is copied
    attached.detach()
    assert not torch.equal(copied(x), model(x))
    theirs.detach()
    assert torch.equal(copied(x), model(x))


def test_an_average_of_the_weights_has_the_units_once() -> None:
    model = Network()
    attach(model, at=is_branch)
    ema = EMAModel(model.parameters(), decay=0.5)
    assert len(ema.shadow_params) == len(model.state_dict())


def test_after_an_error_in_a_pass_the_next_is_right() -> None:
    model = Network()
    attach(model, at=is_branch)
    x = torch.randn(2, 8, 4, 4)
    expected = model(x)
    failing = model.first[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    failing.remove()
    with pytest.raises(InputError, match="outside the forward pass"):
        model.first[0](x)
    assert torch.equal(model(x), expected)


def test_autocast_keeps_the_dtype_of_features() -> None:
    model = Network()
    attach(model, at=is_branch)
    seen = []
    model.first[0].conv.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(2, 8, 4, 4)).float().sum().backward()
    assert seen == [torch.bfloat16]


def test_the_model_and_what_is_drawn_later_are_the_same_with_any_unit() -> None:
    drawn = []
    for unit, kwargs in UNITS:
        torch.manual_seed(0)
        model = Network()
        attach(model, unit, is_branch, reduction=4, **kwargs)
        drawn.append((model.second[1].conv.weight, torch.randn(4)))
    for one in drawn[1:]:
        torch.testing.assert_close(one, drawn[0], rtol=0, atol=0)


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
    assert vit.attention_units.attachment.stages[0].positions[0].num_extra_tokens == 1
    basic = ResNet(BasicBlock, [1, 2, 1, 1])
    assert stages(basic)[1] == (128, ["layer2.0.bn2", "layer2.1.bn2"])
    detector = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    assert [(c, len(names)) for c, names in stages(detector)] == [(256, 3), (512, 4), (1024, 6), (2048, 3)]


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (tiny_vit(), (torch.randn(2, 3, 8, 8),)),
        (ResNet(BasicBlock, [1, 1, 1, 1]), (torch.randn(2, 3, 32, 32),)),
        (ResNet(Bottleneck, [1, 1, 1, 1], groups=2, width_per_group=4), (torch.randn(2, 3, 32, 32),)),
        (tiny_dit(), (torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 3]))),
    ],
)
def test_known_networks_train_with_a_unit(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    attach(model, "cbam", reduction=8)
    output = model(*inputs)
    (output if isinstance(output, Tensor) else output.sample).sum().backward()
    assert all(p.grad is not None for p in model.attention_units.parameters())


@pytest.mark.parametrize(
    ("at", "error"),
    [
        (None, "Network has no block whose place"),
        ([], "empty list"),
        ("first", "is the text 'first'"),
        (lambda name, module: False, "chooses none of the 13 modules"),
        (["first.0.convs"], "'first.0.convs', which is no module of the model; nearest: first.0.conv"),
        (["first.0.conv", "first.0.conv"], "'first.0.conv' twice"),
        (["first.0"], r"of 'first.0', a Block, can't be told; pass Position\('first.0', 'output', channels=...\)"),
        ([Position("first.0", "inside")], "side 'inside'"),
        ([3], "at holds 3"),
    ],
)
def test_places_that_there_are_not(at: object, error: str) -> None:
    with pytest.raises(InputError, match=error):
        attach(Network(), at=at)


@pytest.mark.parametrize(
    ("at", "error"),
    [
        (["first.1.conv", "first.0.conv"], "first.0.conv, .* ran too early, where first.1.conv was next"),
        ([Position("first.0", channels=4)], "the output of first.0 has 8 channels, and its unit is for 4"),
        (["unused"], "left out unused"),
        (["twice"], "twice, .* ran again"),
        (["pair"], r"the output of pair is a tuple"),
    ],
)
def test_places_that_a_pass_does_not_run_as_said(at: list, error: str) -> None:
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


def test_a_sequential_runs_its_own_modules_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
    images = torch.randn(2, 3, 8, 8)
    plain = model(images)
    attachment = attach(model, "fixed-scale", at=["2"], scale=0.5)
    assert torch.equal(model(images), plain * 0.5)
    attachment.detach()
    assert torch.equal(model(images), plain)


def test_models_that_take_no_unit() -> None:
    model = Network()
    with pytest.raises(InputError, match="decides itself"):
        attach(model, at=is_branch, num_blocks=3)
    with pytest.raises(InputError, match="None"):
        attach(model, None, is_branch)
    with pytest.raises(InputError, match="'none'"):
        attach(model, "none", is_branch)
    with pytest.raises(InputError, match="before wrapping"):
        attach(torch.compile(model), at=is_branch)
    attach(model, at=is_branch)
    with pytest.raises(InputError, match="Network has attached units already"):
        attach(nn.Sequential(model), at=["0"])
    around = nn.Sequential(Network())
    attach(around, at=["0.first.0.conv"])
    with pytest.raises(InputError, match=r"first\.0\.conv has an attached unit already"):
        attach(around[0], at=["first.0.conv"])
