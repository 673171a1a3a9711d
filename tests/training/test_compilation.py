"""When a run compiles its network; that it is the same network is seen by its gradients."""

from typing import Any

import pytest
import torch
from torch import nn

from dia_diffusion.errors import InputError
from dia_diffusion.models.uvit import UViT
from dia_diffusion.training import compilation
from dia_diffusion.training.compilation import compiled
from dia_diffusion.training.config import Experiment, ModelConfig
from dia_diffusion.training.diffusion import DiffusionTask

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("setting", "max_steps", "compiler", "expected"),
    [
        ("auto", 5000, True, True),
        ("auto", 4999, True, False),
        ("auto", 5000, False, False),
        (True, 1, True, True),
        (False, 10**6, True, False),
    ],
)
def test_auto_compiles_where_it_pays(
    setting: Any, max_steps: int, compiler: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "find_compiler", lambda: "g++" if compiler else None)
    model = nn.Linear(2, 2)
    assert (compiled(model, setting, max_steps, 5000, CPU) is not model) == expected


def test_networks_of_unknown_gain_are_compiled_when_asked_for_alone() -> None:
    model = nn.Linear(2, 2)
    assert compiled(model, "auto", 10**9, None, CPU) is model
    assert DiffusionTask(Experiment(model=ModelConfig(backbone="unet2d"))).compiling_pays_after is None


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(InputError, match=r"train\.compile cuda-graphs needs a CUDA GPU; accepted here: auto"):
        compiled(nn.Linear(2, 2), "cuda-graphs", 1, None, CPU)


def test_a_compiled_uvit_gives_the_same_gradients() -> None:
    """Traced into one graph and run by torch's own kernels, which takes no compiler."""
    torch.manual_seed(0)
    model = UViT(sample_size=8, patch_size=4, hidden_size=32, num_layers=3, num_attention_heads=2)
    sample, gradients = torch.randn(2, 3, 8, 8), []
    for network in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        network(sample, torch.tensor([3.0, 700.0]), return_dict=False)[0].square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
