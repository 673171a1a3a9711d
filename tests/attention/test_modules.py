"""Each self-attention module against its own paper's formula in numpy, published counts, and other libraries."""

import numpy as np
import pytest
import torch
from scipy.signal import correlate2d
from torchvision.ops import SqueezeExcitation as TorchvisionSE

from dia_diffusion.attention import build_attention
from tests.attention.networks import SAMS, count

N, B, SIDE, R, G = 8, 3, 5, 2, 4
OPTIONS = {"se": {"reduction": R}, "cbam": {"reduction": R}, "spa": {"reduction": R}, "sem": {"reduction": R}}
OPTIONS |= {"sge": {"groups": G}}


def scrambled(name: str, channels: int = N, num_blocks: int = 1, **kwargs: object) -> torch.nn.Module:
    """A unit with random parameters and running statistics, in float64."""
    unit = build_attention(name, channels, num_blocks=num_blocks, **OPTIONS.get(name, {}), **kwargs).double()
    for parameter in unit.parameters():
        torch.nn.init.normal_(parameter)
    for norm in unit.norms:
        torch.nn.init.normal_(norm.running_mean)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return unit


def sigmoid(value: np.ndarray | float) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(value)))


def mlp(sam: torch.nn.Module, pooled: np.ndarray) -> np.ndarray:
    """W2 relu(W1 y + b1) + b2."""
    for layer, activation in ((sam.reduce, lambda x: np.maximum(x, 0)), (sam.expand, lambda x: x)):
        bias = 0 if layer.bias is None else layer.bias.numpy()
        pooled = activation(layer.weight.numpy() @ pooled + bias)
    return pooled


def reference_map(name: str, unit: torch.nn.Module, image: np.ndarray) -> np.ndarray:
    """The scales of one image (N, H, W), in its shape, by the formula of the module's paper in numpy."""
    sam = unit.sams[0]
    weights = {key: value.numpy() for key, value in sam.named_parameters()}
    flat = image.reshape(N, -1)
    mean, high, low = flat.mean(1), flat.max(1), flat.min(1)
    if name == "se":
        channel = sigmoid(mlp(sam, mean))
    elif name == "eca":
        channel = sigmoid(np.correlate(mean, weights["conv.weight"].ravel(), "same"))
    elif name == "srm":
        norm = unit.norms[0]
        z = weights["weight"][:, 0] * mean + weights["weight"][:, 1] * np.sqrt(flat.var(1) + 1e-5)
        z = (z - norm.running_mean.numpy()) / np.sqrt(norm.running_var.numpy() + norm.eps)
        channel = sigmoid(z * norm.weight.numpy() + norm.bias.numpy())
    elif name == "spa":
        pools = []
        for side in (1, 2, 4):  # adaptive pooling's bins: from floor(a H / side) to ceil((a + 1) H / side)
            bins = [slice(k * SIDE // side, -(-(k + 1) * SIDE // side)) for k in range(side)]
            pools += [image[n, rows, columns].mean() for n in range(N) for rows in bins for columns in bins]
        channel = sigmoid(mlp(sam, np.array(pools)))
    elif name == "sem":
        decisions = sigmoid(weights["decide.weight"] @ mean + weights["decide.bias"])
        convolved = np.correlate(mean, weights["conv.weight"].ravel(), "same")
        operators = (mlp(sam, mean), convolved, weights["weight"] * mean + weights["bias"])
        channel = np.prod([sigmoid(d * operator) for d, operator in zip(decisions, operators, strict=True)], axis=0)
    elif name == "spem":
        high, low = (weights["pooled_weight"] * pooled + weights["pooled_bias"] for pooled in (high, low))
        squares = weights["pooling"] ** 2
        mixed = (squares[0] * high + squares[1] * low) / squares.sum()
        channel = sigmoid(high + low) * sigmoid(weights["mixed_weight"] * mixed + weights["mixed_bias"])
    elif name == "cbam":
        channel = sigmoid(mlp(sam, mean) + mlp(sam, high))
        refined = image * channel[:, None, None]
        described = zip((refined.mean(0), refined.max(0)), weights["conv.weight"][0], strict=True)
        place = sigmoid(sum(correlate2d(values, kernel, "same") for values, kernel in described))
        return channel[:, None, None] * place
    else:
        maps = []
        for group in range(G):
            own = slice(group * N // G, (group + 1) * N // G)
            like = (image[own] * mean[own, None, None]).sum(0)
            normalized = (like - like.mean()) / (like.std() + 1e-5)
            maps.append(sigmoid(weights["gamma"][group] * normalized + weights["beta"][group]))
        return np.repeat(maps, N // G, axis=0)
    return np.broadcast_to(channel[:, None, None], image.shape)


@pytest.mark.parametrize("name", SAMS)
def test_each_module_matches_its_formula(name: str) -> None:
    torch.manual_seed(0)
    unit = scrambled(name).eval()
    maps = torch.randn(B, N, SIDE, SIDE, dtype=torch.float64)
    unit.requires_grad_(False)
    recalibrated, state = unit(maps)
    attention_map = unit.attention_map(state)
    expected = torch.tensor(np.stack([reference_map(name, unit, image) for image in maps.numpy()]))
    assert torch.allclose(recalibrated, maps * expected, rtol=1e-7, atol=1e-7)
    if attention_map.dim() == 2:
        attention_map = attention_map[..., None, None]
    assert torch.allclose(attention_map.expand_as(maps), expected, rtol=1e-6, atol=1e-6)


def test_se_matches_torchvision() -> None:
    torch.manual_seed(3)
    unit = build_attention("se", 32, reduction=4)
    theirs = TorchvisionSE(32, 8)
    sam = unit.sams[0]
    for ours, layer in ((sam.reduce, theirs.fc1), (sam.expand, theirs.fc2)):
        layer.weight.data = ours.weight.data[..., None, None]
        layer.bias.data = ours.bias.data
    maps = torch.randn(2, 32, 6, 7)
    assert torch.allclose(unit(maps)[0], theirs(maps), atol=1e-6)


@pytest.mark.parametrize("n", [64, 256])
def test_parameter_counts_by_formula(n: int) -> None:
    k = {64: 3, 256: 5}[n]  # of ECA's paper
    r = 16
    mlp_of = 2 * n * n // r + n // r + n
    expected = {"se": mlp_of, "eca": k, "cbam": mlp_of + 98, "srm": 4 * n, "spa": 22 * n * n // r}
    expected |= {"sem": mlp_of + 3 * n + 3 + k + 2 * n, "spem": 4 * n + 2, "sge": 128}
    assert {name: count(build_attention(name, n, num_blocks=1)) for name in SAMS} == expected
    assert count(build_attention("se", n, bias=False)) == 2 * n * n // r


def test_initial_scales_match_the_published_code() -> None:
    maps = torch.randn(4, 64, 3, 3)
    for name, start in (("srm", 0.5), ("spem", float(sigmoid(-2) * sigmoid(-1))), ("sge", float(sigmoid(1)))):
        unit = build_attention(name, 64, num_blocks=1)
        assert torch.allclose(unit(maps)[0], maps * start)


@pytest.mark.parametrize("name", SAMS)
def test_gradients_are_finite_where_features_are_constant(name: str) -> None:
    unit = scrambled(name)
    maps = torch.zeros(2, N, 4, 4, dtype=torch.float64, requires_grad=True)
    unit(maps)[0].sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (maps, *unit.parameters()) if tensor.grad is not None)
