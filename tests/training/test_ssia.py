"""SSIA, a loss used only in training: its formula, its gradients, and training of diffusion models and classifiers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.resnet import Bottleneck

from dia_diffusion import UViT
from dia_diffusion.errors import InputError
from dia_diffusion.models.attach import attach
from dia_diffusion.models.attached import AttachedModel
from dia_diffusion.models.classifiers import load_classifier
from dia_diffusion.training.classification import ClassificationTask
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.recipe import changed_keys
from dia_diffusion.training.ssia import HEADS, Guidance, without_heads
from dia_diffusion.training.trainer import Trainer
from tests.attention.networks import gradients, tiny_unet, tiny_vit
from tests.training import classify
from tests.training.run_files import assert_same_tensors, metrics, weights
from tests.training.test_backbones import BACKBONES


def tiny_uvit(unit: str = "none") -> nn.Module:
    sizes = {"sample_size": 8, "in_channels": 1, "patch_size": 4, "hidden_size": 16, "num_layers": 5}
    return UViT(**sizes, num_attention_heads=2, attention=unit)


def wrapped(network: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: AttachedModel.from_backbone(network(), "none")


# Network, its stages with two or more places, and whether a place is its module's input.
MIDDLE = ["down_blocks.1.resnets.0", "mid_block.resnets.0", "mid_block.resnets.1"]
UNET = [[*MIDDLE, "up_blocks.0.resnets.0", "up_blocks.0.resnets.1"], ["up_blocks.1.resnets.0", "up_blocks.1.resnets.1"]]
UNET = [[f"network.{name}" for name in stage] for stage in UNET]
VIT = [[f"encoder.layers.encoder_layer_{index}.mlp" for index in range(2)]]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[list[str]], bool]] = {
    "uvit": (tiny_uvit, [["in_blocks.0", "in_blocks.1", "mid_block"]], False),
    "unet": (wrapped(tiny_unet), UNET, False),
    "vit": (tiny_vit, VIT, True),
}
CASES = [("uvit", "dia-lstm"), ("unet", "none"), ("unet", "dia-lstm"), ("vit", "none"), ("vit", "dia-lstm")]
EACH = pytest.mark.parametrize(("name", "unit"), CASES)


def build(name: str, unit: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "uvit":
        return tiny_uvit(unit)
    model = NETWORKS[name][0]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    if unit != "none":
        attach(model.network if isinstance(model, AttachedModel) else model, unit)
    return model


def given(name: str, number: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(number)
    if name == "vit":
        return (torch.randn(3, 3, 8, 8, generator=generator),)
    return (torch.randn(3, 1, 8, 8, generator=generator), torch.tensor([3, 500, 20]))


def output(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    result = model(*inputs)
    return result if isinstance(result, Tensor) else result.sample


def watch(model: nn.Module, name: str) -> dict[str, list[Tensor]]:
    """Records, with its own hooks, each image's channels averaged over positions, in the next forward pass."""
    _, stages, is_input = NETWORKS[name]
    seen: dict[str, list[Tensor]] = {}

    def note(place: str, features: Any) -> None:
        x = features[0] if isinstance(features, tuple) else features
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


@EACH
def test_loss_is_the_formula_at_the_places(name: str, unit: str) -> None:
    model = build(name, unit)
    guidance = Guidance(model, reduction=4, seed=3)
    model.double().train()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in given(name))
    seen = watch(model, name)
    model(*inputs)
    assert guidance.take().item() == pytest.approx(by_hand(seen, NETWORKS[name][1], model.ssia_heads), rel=1e-12)


@EACH
def test_outputs_weights_and_later_draws_are_unchanged(name: str, unit: str) -> None:
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
        assert (guidance.loss is not None) == training  # nothing is computed in evaluation mode
        guidance.loss = None
    torch.testing.assert_close(without_heads(guided.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)


def test_units_decide_the_places_where_they_are_attached() -> None:
    model = tiny_vit()
    attach(
        model,
        "se",
        at=["conv_proj", *(f"encoder.layers.encoder_layer_{index}.mlp.0" for index in range(2))],
        reduction=4,
    )
    Guidance(model, reduction=4, seed=3)
    assert [head[0].in_features for head in model.ssia_heads] == [32]


def test_the_last_block_of_a_stage_is_a_target_without_gradients() -> None:
    model = build("uvit", "none")
    guidance = Guidance(model, reduction=4, seed=3)
    model.train()(*given("uvit"))
    guidance.take().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {HEADS, "in_blocks"} < {name.partition(".")[0] for name in reached}
    assert not any(name.startswith(("mid_block", "out_blocks", "decoder", "norm.")) for name in reached)


@pytest.mark.parametrize(("name", "unit"), [("uvit", "dia-lstm"), ("unet", "dia-lstm")])
def test_recomputation_counts_the_loss_once(name: str, unit: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = build(name, unit)
        guidance = Guidance(model, reduction=4, seed=3)
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        losses = []
        for number in range(2):  # two forward passes, then the backward passes that recompute parts
            prediction = output(model, given(name, number))
            losses.append(prediction.square().mean() + 10 * guidance.take())
        found.append(gradients(model, *losses))
        assert guidance.loss is None and guidance.kept is None
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_compiled_networks_give_the_same_gradients_as_one_graph() -> None:
    model = build("vit", "dia-lstm")
    guidance = Guidance(model, reduction=4, seed=3)
    model.train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = []
    for network in (compiled, model):
        losses = [network(*given("vit", number)).square().mean() + guidance.take() for number in range(2)]
        found.append(gradients(model, *losses))
    torch._dynamo.reset()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


# Training of two backbones, and of a classifier with two blocks per stage.

WEIGHT = ("--ssia.weight", "0.5")
TRAININGS = {
    "uvit": (),
    "unet2d": (*BACKBONES["unet2d"], "--model.attention", "none"),
    # Channels last would round differently.
    "classifier": ("--model.backbone", "cifar-resnet14-basic", "--train.channels_last", "false"),
}
Train = Callable[..., Trainer]


@pytest.fixture
def train_kind(tiny: Callable[..., Experiment], train: Train, tmp_path: Path) -> Train:
    """train_kind("unet2d", "name", "--seed", "1") trains the small recipe of a kind in tmp_path/name."""

    def run(kind: str, name: str, *options: str) -> Trainer:
        if kind == "classifier":
            return classify.train(classify.tiny(tmp_path, name, *TRAININGS[kind], *options))
        return train(tiny(name, *TRAININGS[kind], *options))

    return run


@pytest.mark.parametrize("kind", ["uvit", "unet2d"])
def test_a_pipeline_has_no_heads_and_the_trained_function(kind: str, train_kind: Train, tmp_path: Path) -> None:
    model = train_kind(kind, "run", *WEIGHT, "--train.max_steps", "1").model
    assert any(name.startswith(HEADS) for name in weights(tmp_path / "run", 1))
    folder = tmp_path / "run" / "pipelines" / "step-00000001" / "unet"
    assert "ssia" not in (folder / "config.json").read_text()
    found, expected = load_file(folder / "diffusion_pytorch_model.safetensors"), without_heads(model.state_dict())
    assert {name: w.shape for name, w in found.items()} == {name: w.shape for name, w in expected.items()}
    saved = type(model).from_pretrained(folder).eval()
    saved.load_state_dict(expected)  # the raw weights, not their average
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(saved(x, 5).sample, model.eval()(x, 5).sample)


def test_a_saved_classifier_has_no_heads_and_resumes_bit_for_bit(train_kind: Train, tmp_path: Path) -> None:
    whole = train_kind("classifier", "whole", *WEIGHT)
    train_kind("classifier", "parts", *WEIGHT, "--train.max_steps", "3")
    with pytest.raises(InputError, match=r"ssia\.weight: 0\.5 -> 0\.25"):
        train_kind("classifier", "parts", "--ssia.weight", "0.25")
    train_kind("classifier", "parts", *WEIGHT)
    assert_same_tensors(tmp_path / "whole", tmp_path / "parts")
    assert sum(name.startswith(HEADS) for name in weights(tmp_path / "whole", 6)) == 3 * 4, "two linear layers a stage"
    saved, x = load_classifier(tmp_path / "whole").model, torch.randn(2, 3, 8, 8)
    assert whole.task.num_parameters == sum(parameter.numel() for parameter in saved.parameters())
    with torch.no_grad():
        assert torch.equal(saved(x), whole.model.eval()(x))


@pytest.mark.parametrize("kind", ["uvit", "classifier"])
def test_the_first_loss_is_the_twins_plus_the_weighted_loss(kind: str, train_kind: Train, tmp_path: Path) -> None:
    first = {}
    for weight in ("0", "0.5", "1"):
        reduction = "3" if weight == "0" else "4"  # no head could have 3
        options = ("--ssia.weight", weight, "--ssia.reduction", reduction)
        train_kind(kind, weight, *options, "--train.max_steps", "1")
        first[weight] = metrics(tmp_path / weight)[0]["loss"]
    assert 0 < first["0.5"] - first["0"] < 0.5  # a squared error of two numbers in (0, 1)
    assert first["1"] - first["0"] == pytest.approx(2 * (first["0.5"] - first["0"]), rel=1e-4)
    train_kind(kind, "without", "--train.max_steps", "1")
    assert_same_tensors(tmp_path / "0", tmp_path / "without", 1)


def test_older_runs_count_as_trained_without(tiny: Callable[..., Experiment]) -> None:
    old = tiny("run").to_dict()
    del old["ssia"]
    assert changed_keys(old, tiny("run")) == []


@pytest.mark.parametrize(
    ("network", "reduction", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)), 4, "must be 0 for a Sequential, whose"),
        (lambda: ResNet(Bottleneck, [1, 1, 1, 1]), 4, "a ResNet without two consecutive blocks of the same width"),
        (lambda: wrapped(tiny_unet)(), 5, "must divide the blocks' widths, 8, 16, got 5"),
        (tiny_vit, 0, "got 0"),
    ],
)
def test_networks_that_are_refused(network: Callable[[], nn.Module], reduction: int, message: str) -> None:
    model = network()
    with pytest.raises(InputError, match=message):
        Guidance(model, reduction, seed=0)
    assert not any(name.startswith(HEADS) for name in model.state_dict())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("train", "--ssia.weight -1", "`ssia.weight` must be 0 or more, got -1"),
        ("train", "--ssia.weight 1 --ssia.reduction 3", "`ssia.reduction` must divide .* got 3"),
        ("train", "--ssia.weight 1 --model.num_layers 1", "a UViT without two consecutive blocks of the same width"),
        ("train", "--ssia.weight 1 --optimizer.unit_learning_rate 0.1", "unit_learning_rate"),
        ("classify", "--ssia.weight .inf", "`ssia.weight` must be a finite number, got inf"),
        ("classify", "--ssia.weight 1", "a CifarResNet without two consecutive blocks of the same width"),
    ],
)
def test_recipes_that_are_refused(
    kind: str, options: str, message: str, tiny: Callable[..., Experiment], tmp_path: Path
) -> None:
    read = tiny if kind == "train" else partial(classify.tiny, tmp_path)
    with pytest.raises(InputError, match=message):
        experiment = read("refused", *options.split())
        Trainer(experiment if kind == "train" else ClassificationTask(experiment))
