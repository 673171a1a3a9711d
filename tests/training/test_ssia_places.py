"""SSIA at attach()'s places, against its formula written out from what the named modules give, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

from dia_diffusion.errors import InputError
from dia_diffusion.models.attach import attach
from dia_diffusion.models.attached import AttachedModel
from dia_diffusion.models.cifar_resnet import Layers, cifar_resnet
from dia_diffusion.training.ssia import HEADS, Guidance, without_heads
from tests.attention.networks import gradients, tiny_dit, tiny_unet, tiny_vit


def tiny_resnet() -> nn.Module:
    return ResNet(BasicBlock, [1, 2, 1, 3], num_classes=3)


def tiny_cifar_resnet() -> nn.Module:
    return cifar_resnet(14, 10, Layers("batch", residual=True, branch_norm=False), basic=True)


def wrapped(network: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: AttachedModel.from_backbone(network(), "none")


# Network, its stages of two places or more, and whether a place is what its module is given.
MIDDLE = ["down_blocks.1.resnets.0", "mid_block.resnets.0", "mid_block.resnets.1"]
UNET = [[*MIDDLE, "up_blocks.0.resnets.0", "up_blocks.0.resnets.1"], ["up_blocks.1.resnets.0", "up_blocks.1.resnets.1"]]
UNET = [[f"network.{name}" for name in stage] for stage in UNET]
DIT = [[f"network.transformer_blocks.{index}.ff" for index in range(3)]]
VIT = [[f"encoder.layers.encoder_layer_{index}.mlp" for index in range(2)]]
CIFAR = [[f"stages.{stage}.{block}.branch" for block in range(2)] for stage in range(3)]
RESNET = [["layer2.0.bn2", "layer2.1.bn2"], ["layer4.0.bn2", "layer4.1.bn2", "layer4.2.bn2"]]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[list[str]], bool]] = {
    "unet": (wrapped(tiny_unet), UNET, False),
    "dit": (wrapped(tiny_dit), DIT, True),
    "vit": (tiny_vit, VIT, True),
    "cifar": (tiny_cifar_resnet, CIFAR, False),
    "resnet": (tiny_resnet, RESNET, False),
}
ALL = pytest.mark.parametrize("name", NETWORKS)
UNIT = pytest.mark.parametrize("unit", ["none", "dia-lstm"])


def build(name: str, unit: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name][0]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)  # a DiT begins with blocks that do nothing
    if unit != "none":
        attach(model.network if isinstance(model, AttachedModel) else model, unit)
    return model


def given(name: str, number: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(number)
    if name == "unet":
        return torch.randn(3, 1, 8, 8, generator=generator), torch.tensor([3, 500, 20])
    if name == "dit":
        return torch.randn(3, 1, 8, 8, generator=generator), torch.tensor([3, 500, 20]), torch.tensor([0, 2, 1])
    size = 32 if name == "resnet" else 8
    return (torch.randn(3, 3, size, size, generator=generator),)


def output(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    result = model(*inputs)
    return result if isinstance(result, Tensor) else result.sample


def watch(model: nn.Module, name: str) -> dict[str, list[Tensor]]:
    """Fills in, by hooks of its own, each image's channels, averaged place by place, of the pass that comes."""
    _, stages, is_input = NETWORKS[name]
    seen: dict[str, list[Tensor]] = {}

    def note(place: str, x: Tensor) -> None:
        places = [x[:, :, h, w] for h in range(x.shape[2]) for w in range(x.shape[3])] if x.dim() == 4 else None
        places = [x[:, token] for token in range(x.shape[1])] if places is None else places
        seen[place] = list(sum(part.detach() for part in places) / len(places))  # type: ignore[arg-type]

    for place in (place for stage in stages for place in stage):
        module = model.get_submodule(place)
        if is_input:
            module.register_forward_pre_hook(lambda _, args, place=place: note(place, args[0]))
        else:
            module.register_forward_hook(lambda _, __, out, place=place: note(place, out))
    return seen


def by_hand(seen: dict[str, list[Tensor]], stages: list[list[str]], heads: nn.ModuleList) -> float:
    errors, remaining = [], list(heads)
    for *lower, last in stages:
        for place in lower:
            first, _, second = remaining.pop(0)
            total = 0.0
            for features, y in zip(seen[place], seen[last], strict=True):
                target = 1 / (1 + torch.exp(-(y - y.mean()) / (y.var() ** 0.5 + 1e-6)))
                hidden = (first.weight @ features + first.bias).clamp(min=0)
                foreseen = 1 / (1 + torch.exp(-(second.weight @ hidden + second.bias)))
                total += float(((foreseen - target) ** 2).sum().detach())
            errors.append(total / (len(seen[place]) * len(seen[last][0])))
    assert not remaining
    return sum(errors) / len(errors)


@ALL
@UNIT
def test_loss_is_the_formula_at_the_places(name: str, unit: str) -> None:
    model = build(name, unit)
    guidance = Guidance(model, reduction=4, seed=3)
    model.double().train()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in given(name))
    seen = watch(model, name)
    model(*inputs)
    assert guidance.take().item() == pytest.approx(by_hand(seen, NETWORKS[name][1], model.ssia_heads), rel=1e-12)


@ALL
@UNIT
def test_outputs_weights_and_later_draws_are_those_without(name: str, unit: str) -> None:
    plain, guided = build(name, unit), build(name, unit)
    before = torch.random.get_rng_state()
    guidance = Guidance(guided, reduction=4, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    own = guided.state_dict()
    assert list(without_heads(own)) == list(plain.state_dict()) and len(own) > len(plain.state_dict())
    for training in (True, False):
        torch.manual_seed(1)
        expected = output(plain.train(training), given(name))
        torch.manual_seed(1)
        assert torch.equal(output(guided.train(training), given(name)), expected)
        assert (guidance.loss is not None) == training  # in evaluation nothing is computed
        guidance.loss = None
    torch.testing.assert_close(without_heads(guided.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)


def test_units_decide_the_places_where_they_are_attached() -> None:
    model = build("resnet", "none")
    attach(model, "se", at=["layer1.0.conv1", "layer4.0.bn2", "layer4.1.bn2"])
    Guidance(model, reduction=4, seed=3)
    assert [head[0].in_features for head in model.ssia_heads] == [512]


def test_the_last_of_a_stage_teaches_and_is_not_taught() -> None:
    model = build("resnet", "none")
    guidance = Guidance(model, reduction=4, seed=3)
    model.train()(*given("resnet"))
    guidance.take().backward()
    taught = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith("layer4.1.conv2") for name in taught) and any(name.startswith(HEADS) for name in taught)
    assert not any(name.startswith(("layer4.2.", "fc.")) for name in taught)


@UNIT
@pytest.mark.parametrize("name", ["unet", "dit"])
def test_recomputation_counts_the_loss_once(name: str, unit: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = build(name, unit)
        guidance = Guidance(model, reduction=4, seed=3)
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        losses = []
        for number in range(2):  # two passes, then the backward passes that run parts again
            prediction = output(model, given(name, number))
            losses.append(prediction.square().mean() + 10 * guidance.take())
        found.append(gradients(model, *losses))
        assert guidance.loss is None and guidance.kept is None
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_compiled_networks_give_the_same_gradients_as_one_graph() -> None:
    model = build("resnet", "dia-lstm")
    guidance = Guidance(model, reduction=4, seed=3)
    model.train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for network in (compiled, model):
        losses = [network(*given("resnet", number)).square().mean() + guidance.take() for number in range(2)]
        found.append(gradients(model, *losses))
    torch._dynamo.reset()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("network", "reduction", "told"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)),
            4,
            "must be 0 for a Sequential, whose",
        ),
        (lambda: ResNet(Bottleneck, [1, 1, 1, 1]), 4, "a ResNet without two blocks of one width in a row"),
        (lambda: wrapped(tiny_unet)(), 5, "must divide the blocks' widths, 8, 16, got 5"),
        (tiny_vit, 0, "got 0"),
    ],
)
def test_refusals(network: Callable[[], nn.Module], reduction: int, told: str) -> None:
    model = network()
    with pytest.raises(InputError, match=told):
        Guidance(model, reduction, seed=0)
    assert not any(name.startswith(HEADS) for name in model.state_dict())
