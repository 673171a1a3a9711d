"""SSIA: a loss of training alone. What it leaves behind is a pipeline like any other, and weight 0 is none at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dia_diffusion import UViT
from dia_diffusion.errors import InputError
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.recipe import changed_keys
from dia_diffusion.training.run_folder import read_metrics
from dia_diffusion.training.ssia import HEADS, Guidance
from dia_diffusion.training.trainer import Trainer
from tests.training.conftest import Recorder
from tests.training.test_backbones import KWARGS
from tests.training.test_processes import in_float64, launch, losses

SMALL = {"sample_size": 8, "in_channels": 1, "patch_size": 4, "hidden_size": 16, "num_layers": 5}
SIZES = {**SMALL, "num_attention_heads": 2}
# What of the tiny recipe is a UViT's, as it is without being given.
USUAL = ("--model.patch_size", "2", "--model.hidden_size", "512", "--model.num_layers", "13")
USUAL = (*USUAL, "--model.num_attention_heads", "8")
BACKBONES = {
    "uvit": (),
    "unet2d": (*USUAL, "--model.backbone", "unet2d", "--model.backbone_kwargs", KWARGS["unet2d"]),
    "dit": (*USUAL, "--model.backbone", "dit", "--model.backbone_kwargs", KWARGS["dit"], "--model.attention", "none"),
}
EACH = pytest.mark.parametrize("backbone", BACKBONES)


def by_hand(model: UViT, heads: torch.nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    """The loss by the docstring's formulas, channel by channel, from the outputs of the blocks."""
    outputs = []
    hooks = [
        block.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
        for block in (*model.in_blocks, model.mid_block)
    ]
    model.eval()(x, 7.0)
    for hook in hooks:
        hook.remove()
    *lower, middle = [output.double().mean(1) for output in outputs]
    total = 0.0
    for features, head in zip(lower, heads.double(), strict=True):
        first, _, second = head
        for image in range(len(x)):
            y = middle[image]
            target = 1 / (1 + torch.exp(-(y - y.mean()) / y.std()))
            hidden = (first.weight @ features[image] + first.bias).clamp(min=0)
            foreseen = 1 / (1 + torch.exp(-(second.weight @ hidden + second.bias)))
            total += float(((foreseen - target) ** 2).sum().detach())
    return torch.tensor(total / (len(lower) * middle.numel()))


def test_loss_is_the_formula_and_teaches_lower_blocks_alone() -> None:
    torch.manual_seed(0)
    model = UViT(**SIZES)
    guidance = Guidance(model, reduction=4, seed=3)
    x = torch.randn(3, 1, 8, 8)
    model.train()(x, 7.0)
    loss = guidance.take()
    loss.backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    # The unit and the embeddings act on the in blocks, which are taught; the middle block only teaches.
    assert reached >= {"in_blocks", HEADS} and not reached & {"mid_block", "out_blocks", "decoder", "norm"}
    assert torch.allclose(loss.double(), by_hand(model, model.ssia_heads, x).double(), atol=1e-6)


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = UViT(**SIZES)
        guidance = Guidance(model, reduction=4, seed=3)
        if checkpointing:
            model.enable_gradient_checkpointing()
        for number in range(2):  # what the first backward recomputes must not reach the second forward
            torch.manual_seed(number)
            prediction = model.train()(torch.randn(3, 1, 8, 8), 7.0).sample
            (prediction.square().mean() + guidance.take()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@EACH
def test_heads_stay_out_of_pipelines_and_inference(
    tiny: Callable[..., Experiment], train: Callable[..., Any], backbone: str
) -> None:
    guided = train(tiny("guided", "--ssia.weight", "0.5", *BACKBONES[backbone]))
    plain = train(tiny("plain", *BACKBONES[backbone]))
    tensors = [load_file(_unet(run.folder.path)) for run in (guided, plain)]
    assert tensors[0].keys() == tensors[1].keys()
    configs = [json.loads((_unet(run.folder.path).parent / "config.json").read_text()) for run in (guided, plain)]
    assert configs[0] == configs[1]
    assert any(name.startswith(HEADS) for name in load_file(_checkpoint(guided.folder.path)))
    assert any(not torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0] if "blocks" in name)
    # The same function: the trained network in evaluation, heads and all, is the pipeline with its weights.
    saved = type(guided.model).from_pretrained(_unet(guided.folder.path).parent).eval()
    saved.load_state_dict({k: v for k, v in guided.model.state_dict().items() if not k.startswith(HEADS)})
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(saved(x, 5).sample, guided.model.eval()(x, 5).sample)


def test_first_step_sees_the_twins_weights_and_a_larger_loss(
    tiny: Callable[..., Experiment], train: Callable[..., Any]
) -> None:
    runs = [train(tiny(name, *options)) for name, options in (("a", ()), ("b", ("--ssia.weight", "0.5")))]
    first = [read_metrics(run.folder.metrics)[0]["loss"] for run in runs]
    assert 0 < first[1] - first[0] < 0.5  # a squared error of two numbers in (0, 1)


@EACH
def test_resumes_exactly(tiny: Callable[..., Experiment], train: Callable[..., Any], backbone: str) -> None:
    options = ("--ssia.weight", "0.5", *BACKBONES[backbone])
    whole = train(tiny("whole", *options))
    train(tiny("parts", *options, "--train.max_steps", "3"))
    parts = train(tiny("parts", *options))
    a, b = whole.model.state_dict(), parts.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@EACH
def test_weight_zero_is_the_same_training(
    tiny: Callable[..., Experiment], train: Callable[..., Any], backbone: str
) -> None:
    none = ("--ssia.weight", "0", "--ssia.reduction", "3")  # which no head could have
    runs = [train(tiny(name, *more, *BACKBONES[backbone])) for name, more in (("a", ()), ("b", none))]
    states = [run.model.state_dict() for run in runs]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("backbone", ["uvit", "unet2d"])
def test_two_processes_train_what_one_does(tmp_path: Path, backbone: str) -> None:
    options = ("--ssia.weight", "0.5", *BACKBONES[backbone])
    parts = ("--train.accumulation", "2", "--train.gradient_checkpointing", "true")
    one = launch(tmp_path, "one", 1, *options, prepare=in_float64)
    two = launch(tmp_path, "two", 2, *options, *parts, prepare=in_float64)
    assert losses(two) == pytest.approx(losses(one), rel=1e-9)
    expected, found = load_file(_checkpoint(one)), load_file(_checkpoint(two))
    assert any(name.startswith(HEADS) for name in expected)
    assert max(float((expected[name] - found[name]).abs().max()) for name in expected) < 1e-9


def test_changed_keys_are_refused_and_older_runs_had_none(tiny: Callable[..., Experiment]) -> None:
    old = tiny("run").to_dict()
    assert changed_keys(old, tiny("run", "--ssia.weight", "0.5")) == ["ssia.weight: 0.0 -> 0.5"]
    del old["ssia"]
    assert changed_keys(old, tiny("run")) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--ssia.weight", "-1"), "`ssia.weight` must be 0 or more, got -1"),
        (("--ssia.weight", "1", "--ssia.reduction", "3"), "`ssia.reduction` must divide .* got 3"),
        (("--ssia.weight", "1", "--model.num_layers", "1"), "a UViT without two blocks of one width in a row"),
        (("--ssia.weight", "1", "--optimizer.unit_learning_rate", "0.1"), "unit_learning_rate"),
    ],
)
def test_refusals(tiny: Callable[..., Experiment], options: tuple[str, ...], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Trainer(tiny("refused", *options), Recorder())


def _unet(run: Path) -> Path:
    return run / "pipelines" / "step-00000006" / "unet" / "diffusion_pytorch_model.safetensors"


def _checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "step-00000006" / "model.safetensors"
