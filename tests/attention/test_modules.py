"""Each self-attention module against loops over its own paper's formula, published counts, and other libraries."""

import math

import pytest
import torch
from torchvision.ops import SqueezeExcitation as TorchvisionSE

from dia_diffusion.attention import build_attention

MODULES = ("se", "eca", "cbam", "srm", "spa", "sem", "spem", "sge")
N, B, SIDE, R, G = 8, 3, 5, 2, 4
OPTIONS = {"se": {"reduction": R}, "cbam": {"reduction": R}, "spa": {"reduction": R}, "sem": {"reduction": R}}
OPTIONS |= {"sge": {"groups": G}}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def scrambled(name: str, channels: int = N, num_blocks: int = 1, **kwargs: object) -> torch.nn.Module:
    """A unit whose parameters and running statistics no longer stand where they start, in float64."""
    unit = build_attention(name, channels, num_blocks=num_blocks, **OPTIONS.get(name, {}), **kwargs).double()
    for parameter in unit.parameters():
        torch.nn.init.normal_(parameter)
    for norm in unit.norms:
        torch.nn.init.normal_(norm.running_mean)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return unit


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def mlp(sam: torch.nn.Module, pooled: list[float]) -> list[float]:
    """W2 relu(W1 y + b1) + b2 by loops."""

    def layer(linear: torch.nn.Linear, x: list[float]) -> list[float]:
        bias = [0.0] * len(linear.weight) if linear.bias is None else linear.bias.tolist()
        rows = zip(linear.weight.tolist(), bias, strict=True)
        return [b + sum(w * v for w, v in zip(row, x, strict=True)) for row, b in rows]

    return layer(sam.expand, [max(0.0, v) for v in layer(sam.reduce, pooled)])


def convolved(weights: list[float], values: list[float]) -> list[float]:
    """A one-dimensional cross-correlation with zeros beyond the ends."""
    half = len(weights) // 2
    padded = [0.0] * half + values + [0.0] * half
    return [sum(w * padded[n + j] for j, w in enumerate(weights)) for n in range(len(values))]


def reference_map(name: str, unit: torch.nn.Module, image: list[list[list[float]]]) -> list[list[list[float]]]:
    """What one image's maps [channel][row][column] are multiplied with, in the same shape, by loops."""
    sam, rows = unit.sams[0], range(SIDE)
    flat = [[image[n][i][j] for i in rows for j in rows] for n in range(N)]
    mean = [sum(values) / len(values) for values in flat]
    if name == "se":
        channel = [sigmoid(v) for v in mlp(sam, mean)]
    elif name == "eca":
        channel = [sigmoid(v) for v in convolved(sam.conv.weight.flatten().tolist(), mean)]
    elif name == "srm":
        channel, norm = [], unit.norms[0]
        for n, values in enumerate(flat):
            deviation = math.sqrt(sum((v - mean[n]) ** 2 for v in values) / len(values) + 1e-5)
            z = float(sam.weight[n, 0]) * mean[n] + float(sam.weight[n, 1]) * deviation
            z = (z - float(norm.running_mean[n])) / math.sqrt(float(norm.running_var[n]) + norm.eps)
            channel.append(sigmoid(z * float(norm.weight[n]) + float(norm.bias[n])))
    elif name == "spa":
        pools = []
        for side in (1, 2, 4):
            for n in range(N):
                for a in range(side):
                    for b in range(side):
                        # Adaptive pooling's bins: from floor(a H / side) to ceil((a + 1) H / side).
                        own = [range(k * SIDE // side, -(-(k + 1) * SIDE // side)) for k in (a, b)]
                        values = [image[n][i][j] for i in own[0] for j in own[1]]
                        pools.append(sum(values) / len(values))
        channel = [sigmoid(v) for v in mlp(sam, pools)]
    elif name == "sem":
        d = [
            sigmoid(float(sam.decide.bias[k]) + sum(float(sam.decide.weight[k, n]) * mean[n] for n in range(N)))
            for k in range(3)
        ]
        operators = [
            mlp(sam, mean),
            convolved(sam.conv.weight.flatten().tolist(), mean),
            [float(sam.weight[n]) * mean[n] + float(sam.bias[n]) for n in range(N)],
        ]
        channel = [math.prod(sigmoid(d[k] * operators[k][n]) for k in range(3)) for n in range(N)]
    elif name == "spem":
        squares = [float(p) ** 2 for p in sam.pooling]
        channel = []
        for n, values in enumerate(flat):
            high, low = (
                float(sam.pooled_weight[n]) * v + float(sam.pooled_bias[n]) for v in (max(values), min(values))
            )
            mixed = (squares[0] * high + squares[1] * low) / sum(squares)
            excited = float(sam.mixed_weight[n]) * mixed + float(sam.mixed_bias[n])
            channel.append(sigmoid(high + low) * sigmoid(excited))
    elif name == "cbam":
        highest = [max(values) for values in flat]
        channel = [sigmoid(a + b) for a, b in zip(mlp(sam, mean), mlp(sam, highest), strict=True)]
        place = cbam_place(sam, [[[image[n][i][j] * channel[n] for j in rows] for i in rows] for n in range(N)])
        return [[[channel[n] * place[i][j] for j in rows] for i in rows] for n in range(N)]
    else:
        return sge_map(sam, image, mean)
    return [[[channel[n] for _ in rows] for _ in rows] for n in range(N)]


def cbam_place(sam: torch.nn.Module, image: list[list[list[float]]]) -> list[list[float]]:
    """The 7x7 convolution of mean and maximum over channels, by loops."""
    mean = [[sum(image[n][i][j] for n in range(N)) / N for j in range(SIDE)] for i in range(SIDE)]
    highest = [[max(image[n][i][j] for n in range(N)) for j in range(SIDE)] for i in range(SIDE)]
    place = [[0.0] * SIDE for _ in range(SIDE)]
    weight = sam.conv.weight[0].tolist()
    for i in range(SIDE):
        for j in range(SIDE):
            for k, described in enumerate((mean, highest)):
                for a in range(7):
                    for b in range(7):
                        y, x = i + a - 3, j + b - 3
                        if 0 <= y < SIDE and 0 <= x < SIDE:
                            place[i][j] += weight[k][a][b] * described[y][x]
            place[i][j] = sigmoid(place[i][j])
    return place


def sge_map(sam: torch.nn.Module, image: list[list[list[float]]], mean: list[float]) -> list[list[list[float]]]:
    """Each group's normalized similarity to its mean, by loops."""
    maps = []
    for n in range(N):
        group = n // (N // G)
        own = range(group * N // G, (group + 1) * N // G)
        like = [[sum(image[m][i][j] * mean[m] for m in own) for j in range(SIDE)] for i in range(SIDE)]
        values = [v for row in like for v in row]
        middle = sum(values) / len(values)
        deviation = math.sqrt(sum((v - middle) ** 2 for v in values) / len(values)) + 1e-5
        gamma, beta = float(sam.gamma[group]), float(sam.beta[group])
        maps.append([[sigmoid(gamma * (v - middle) / deviation + beta) for v in row] for row in like])
    return maps


@pytest.mark.parametrize("name", MODULES)
def test_by_loops(name: str) -> None:
    torch.manual_seed(0)
    unit = scrambled(name).eval()
    maps = torch.randn(B, N, SIDE, SIDE, dtype=torch.float64)
    unit.requires_grad_(False)
    recalibrated, state = unit(maps)
    attention_map = unit.attention_map(state)
    expected = torch.tensor([reference_map(name, unit, image) for image in maps.tolist()], dtype=torch.float64)
    assert torch.allclose(recalibrated, maps * expected, rtol=1e-7, atol=1e-7)
    if attention_map.dim() == 2:
        attention_map = attention_map[..., None, None]
    assert torch.allclose(attention_map.expand_as(maps), expected, rtol=1e-6, atol=1e-6)


def test_se_is_torchvisions() -> None:
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
    assert {name: count(build_attention(name, n, num_blocks=1)) for name in MODULES} == expected
    assert count(build_attention("se", n, bias=False)) == 2 * n * n // r


def test_where_the_published_code_starts() -> None:
    maps = torch.randn(4, 64, 3, 3)
    for name, start in (("srm", 0.5), ("spem", sigmoid(-2) * sigmoid(-1)), ("sge", sigmoid(1))):
        unit = build_attention(name, 64, num_blocks=1)
        assert torch.allclose(unit(maps)[0], maps * start)


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_finite_where_features_are_constant(name: str) -> None:
    unit = scrambled(name)
    maps = torch.zeros(2, N, 4, 4, dtype=torch.float64, requires_grad=True)
    unit(maps)[0].sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (maps, *unit.parameters()) if tensor.grad is not None)
