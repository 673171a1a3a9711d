"""Skip scaling, QK-norm and stochastic depth of a UViT, against the reference network and closed forms."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dia_diffusion import UViT
from dia_diffusion.models.uvit_blocks import Block, HeadNorm
from tests.models.reference_uvit import official, u_vit

SMALL = {"sample_size": 8, "patch_size": 2, "hidden_size": 32, "num_layers": 5, "num_attention_heads": 4}
DROP = {"drop_path": 0.6}
POWER = {"skip_scaling": "power", "skip_kappa": 0.7}
OPTIONS: dict[str, tuple[dict[str, Any], list[float] | None]] = {
    "constant": ({"skip_scaling": "constant"}, [0.5**0.5, 0.5**0.5]),
    "power": (POWER, [1.0, 0.7]),
    "learned": ({"skip_scaling": "learned"}, None),
    "qk-norm": ({"qk_norm": True}, None),
    "drop-path": (DROP, None),
    "all": ({"skip_scaling": "learned", "qk_norm": True, **DROP}, None),
}
EACH = pytest.mark.parametrize("name", OPTIONS)
X, T = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 999, 6)
DRAWS = torch.rand(6, 5, 2, generator=torch.Generator().manual_seed(1))


def build(option: str, attention: str | None = None, num_layers: int = 5) -> UViT:
    torch.manual_seed(0)
    model = UViT(**{**SMALL, "num_layers": num_layers}, attention=attention, **OPTIONS[option][0])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    for name, parameter in model.named_parameters():
        if "_norm" in name:
            nn.init.uniform_(parameter, 0.5, 2.0)
    return model


@EACH
def test_it_matches_the_reference_network(name: str, tmp_path: Path) -> None:
    model, factors = build(name), OPTIONS[name][1]
    model.save_pretrained(tmp_path)
    weights = official(model.state_dict())
    rates = torch.tensor([0.0, 0.15, 0.3, 0.45, 0.6]) * (model.drop_path > 0)
    kept = DRAWS.ge(rates[:, None]) / (1 - rates[:, None])
    with torch.no_grad():
        in_evaluation = UViT.from_pretrained(tmp_path)(X, T, depth_draws=DRAWS).sample
        torch.testing.assert_close(in_evaluation, u_vit(weights, X, T, skip_factors=factors), rtol=1e-4, atol=1e-4)
        in_training = model.train()(X, T, depth_draws=DRAWS).sample
        expected = u_vit(weights, X, T, skip_factors=factors, kept=kept)
        torch.testing.assert_close(in_training, expected, rtol=1e-4, atol=1e-4)
        plain = {key: tensor for key, tensor in weights.items() if "_norm" not in key and "calibration" not in key}
        assert (expected - u_vit(plain, X, T)).abs().max() > 0.01, "the option changes nothing"


@EACH
def test_twins_start_from_the_same_weights(name: str) -> None:
    models = []
    for options in ({}, OPTIONS[name][0]):
        torch.manual_seed(0)
        models.append(UViT(**SMALL, attention="dia-lstm", **options))
    plain, own = (model.state_dict() for model in models)
    assert all(torch.equal(own[key], tensor) for key, tensor in plain.items())
    added = [key for key in own if key not in plain]
    assert all("_norm" in key or key.startswith("skip_calibration") for key in added)
    assert all((own[key] == 1).all() for key in added if "_norm" in key)
    assert list(own)[-1].startswith("unit."), "optimizer groups need the unit's parameters last"
    if "skip_calibration.fc1.weight" in own:
        assert own["skip_calibration.fc1.weight"].shape == (1, 17)
        factors = models[1].skip_calibration(torch.randn(2, 17, 32))
        assert factors.shape == (2, 17, 1) and (factors - 0.5).abs().max() < 0.35


def test_dropping_preserves_the_expectation_and_drops_at_its_rate() -> None:
    """With a zero attention branch, a block's output averages to x plus its MLP branch over evenly spaced draws."""
    torch.manual_seed(0)
    block = Block(32, 4, 4.0, False, drop_path=0.25).double()
    nn.init.zeros_(block.attn.proj.weight)
    nn.init.zeros_(block.attn.proj.bias)
    x = torch.randn(1, 17, 32, dtype=torch.float64)
    draws = ((torch.arange(400) + 0.5) / 400)[:, None].expand(400, 2)
    with torch.no_grad():
        expected, _ = block(x, None, None)
        outputs, _ = block(x.expand(400, 17, 32), None, None, draws=draws)
    torch.testing.assert_close(outputs.mean(dim=0), expected[0])
    assert [bool(torch.equal(output, x[0])) for output in outputs] == [True] * 100 + [False] * 300


def test_without_draws_torch_draws_them() -> None:
    model = build("drop-path").train()
    with torch.no_grad():
        torch.manual_seed(3)
        own = model(X, T).sample
        torch.manual_seed(3)
        assert torch.equal(own, model(X, T, depth_draws=torch.rand(6, 5, 2)).sample)
        assert not torch.equal(own, model(X, T).sample)
        assert torch.equal(model.eval()(X, T).sample, model(X, T).sample)


def test_the_units_state_continues_through_dropped_branches() -> None:
    """All blocks but the first drop their branches; the unit still runs in every block and passes its state on."""
    model = build("drop-path", "dia-lstm").train()
    calls: list[tuple[Any, Any]] = []
    model.unit.register_forward_hook(lambda _, given, returned: calls.append((given[1], returned[1])))
    with torch.no_grad():
        model(X, T, depth_draws=torch.zeros(6, 5, 2))
    assert len(calls) == 5
    assert all(state is before for (_, before), (state, _) in pairwise(calls))


@pytest.mark.parametrize(("how", "name"), [*(("checkpointed", name) for name in OPTIONS), ("compiled", "all")])
def test_checkpointing_and_compiling_keep_the_gradients(how: str, name: str) -> None:
    torch._dynamo.reset()
    model = build(name, "dia-lstm", num_layers=3).train()
    twin = copy.deepcopy(model)
    if how == "checkpointed":
        model.enable_gradient_checkpointing()
    run = torch.compile(model, fullgraph=True, backend="eager") if how == "compiled" else model
    for network in (run, twin):
        network(X, T, depth_draws=DRAWS[:, :3]).sample.square().mean().backward()
    for (key, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        close = {"rtol": 1e-3, "atol": 1e-6} if how == "compiled" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(ours.grad, theirs.grad, **close, msg=key)


@EACH
def test_low_precision(name: str) -> None:
    model = build(name, "dia-lstm").train()
    exact = model(X, T, depth_draws=DRAWS).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(X, T, depth_draws=DRAWS).sample
    low.float().sum().backward()
    assert (low - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    half = model.to(torch.bfloat16)(X.bfloat16(), T, depth_draws=DRAWS).sample
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, torch.float64])
def test_head_norm_computes_in_float32_or_more(kind: torch.dtype) -> None:
    x = 300 * torch.randn(2, 4, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(kind)
    norm = HeadNorm(8, eps=1e-6).to(kind if kind == torch.float64 else torch.float32)

    def expected(x: Tensor) -> Tensor:
        wide = x.double()
        return (wide / (wide.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()).to(kind)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = norm(x)
    assert found.dtype == kind
    torch.testing.assert_close(found, expected(x), rtol={torch.float64: 1e-12}.get(kind, 1e-6), atol=0)
