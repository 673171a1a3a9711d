"""Which attention is faster on a CPU: softmax of explicit products, or torch's scaled_dot_product_attention.

`softmax_attention` in dia_diffusion/models/uvit_blocks.py is based on this table.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from timing import Found, note
from torch import Tensor

from dia_diffusion.precision import DTYPES

# Images, heads, tokens and head width: the digits recipe, then U-ViT-S at increasing resolutions.
SHAPES = (
    (32, 4, 5, 32),
    (32, 8, 17, 64),
    (32, 8, 65, 64),
    (16, 8, 129, 64),
    (8, 8, 257, 64),
    (4, 8, 513, 64),
    (4, 8, 1025, 64),
)
OPERATIONS_PER_ROUND = 1e9


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of (B, heads, L, D) each."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def measure(rounds: int, precision: str, device: torch.device) -> list[Found]:
    """A table of milliseconds, with both ways interleaved: forward without gradients, then forward and backward."""
    rows, dtype = [], DTYPES[precision]
    for images, heads, tokens, width in SHAPES:
        repeats = max(1, round(OPERATIONS_PER_ROUND / (4 * images * heads * tokens**2 * width)))
        # Views of one tensor, as a network has them.
        qkv = torch.randn(images, tokens, 3 * heads * width, device=device, dtype=getattr(torch, dtype))
        q, k, v = rearrange(qkv, "B L (K H D) -> K B H L D", K=3, H=heads)
        ways = {"explicit": explicit, "torch": F.scaled_dot_product_attention}
        seconds: dict[tuple[str, bool], list[float]] = {(name, train): [] for name in ways for train in (False, True)}
        for _ in range(rounds + 1):  # the first to warm up
            for name, train in seconds:
                seconds[name, train].append(_seconds(ways[name], q, k, v, train, repeats))
        row: dict[str, object] = {"what": f"{images} x {heads} heads x {tokens} tokens x {width}"}
        for train in (False, True):
            medians = {name: 1000 * statistics.median(seconds[name, train][1:]) for name in ways}
            of = "forward, backward" if train else "forward"
            row |= {f"{of}: {name}, ms": milliseconds for name, milliseconds in medians.items()}
            row[f"{of}: torch / explicit"] = medians["torch"] / medians["explicit"]
        rows.append(row)
        note(str(row["what"]))
    return [Found(f"Attention in {dtype}, {torch.get_num_threads()} threads", rows)]


def _seconds(way: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, train: bool, repeats: int) -> float:
    inputs = [tensor.detach().requires_grad_(train) for tensor in (q, k, v)]
    gradient = torch.ones_like(q)
    started = time.perf_counter()
    for _ in range(repeats):
        if train:
            torch.autograd.grad(way(*inputs), inputs, gradient)
        else:
            with torch.no_grad():
                way(*inputs)
    return (time.perf_counter() - started) / repeats
