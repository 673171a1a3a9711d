"""Units that start as the identity: a new network equals the network without a unit bit for bit."""

import pytest
import torch

from dia_diffusion import UViT
from dia_diffusion.attention import build_attention

IDENTITIES = ("dia-lstm-identity", "dia-lstm-light-identity")
SMALL = {"sample_size": 8, "patch_size": 2, "hidden_size": 32, "num_layers": 5, "num_attention_heads": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 7, 32), (3, 32, 5, 4)], ids=["tokens", "maps"])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        *((name, {}) for name in IDENTITIES),
        ("dia-lstm-identity", {"num_cells": 3, "dropout": 0.5}),
        ("se", {"scale": 2.0, "zero_init": True}),
        ("se", {"scale": 2.0, "zero_init": True, "sharing": "individual"}),
    ],
)
def test_each_blocks_features_pass_unchanged(name: str, kwargs: dict, shape: tuple, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    unit = build_attention(name, 32, num_blocks=20, **kwargs)
    state = None
    for block in range(20):
        features = (10.0 ** (block % 5 - 2) * torch.randn(shape)).to(dtype)
        recalibrated, state = unit(features, state)
        assert torch.equal(recalibrated, features)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", [*IDENTITIES, "block-channels-time"])
def test_a_new_uvit_equals_the_one_without_unit(name: str, autocast: bool) -> None:
    outputs, gradients = [], []
    for attention in (None, name):
        torch.manual_seed(0)
        model = UViT(**SMALL, attention=attention, pool_tokens="patch")
        x, t = torch.randn(4, 3, 8, 8), torch.tensor([0.0, 3.3, 500.0, 999.0])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = model(x, t).sample
        output.float().square().mean().backward()
        outputs.append(output)
        gradients.append({key: value.grad for key, value in model.named_parameters()})
    assert torch.equal(*outputs)
    unit = [grad for key, grad in gradients[1].items() if key.startswith("unit.")]
    assert any(grad.abs().max() > 0 for grad in unit), "the unit can leave the identity"


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity_units_are_dia_lstm_with_scale_4(name: str) -> None:
    torch.manual_seed(0)
    unit = build_attention(name, 32)
    twin = build_attention(name.removesuffix("-identity"), 32, scale=4.0)
    for parameter in unit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    twin.load_state_dict(unit.state_dict())
    features = torch.randn(2, 7, 32)
    assert torch.equal(unit(features)[0], twin(features)[0])
