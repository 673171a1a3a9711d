"""U-ViT as a function, written from the figure in its paper, independently of the library."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

OFFICIAL_NAMES = {"patch_embed.": "patch_embed.proj.", "decoder.": "decoder_pred.", "output_conv.": "final_layer."}


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A UViT's tensors under the names of the official code."""
    for ours, theirs in OFFICIAL_NAMES.items():
        state = {name.replace(ours, theirs): tensor for name, tensor in state.items()}
    return state


def u_vit(
    weights: dict[str, Tensor],
    x: Tensor,
    times: Tensor,
    labels: Tensor | None = None,
    num_heads: int = 4,
    residual: bool = True,
    skip_factors: Sequence[float] | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """The network of the U-ViT paper, from weights under the official names; a LayerNorm without weights is left out.

    ScaleLong's learned scaling and RMSNorm on queries and keys are applied if their weights are given.

    skip_factors: factors of the long skips, in the order of the in blocks.
    kept: (B, blocks, 2), factors of the attention and MLP branches.
    """
    _, num_tokens, width = weights["pos_embed"].shape
    patch = weights["patch_embed.proj.weight"].shape[-1]
    side = math.isqrt(num_tokens - 1)

    def linear(name: str, tokens: Tensor) -> Tensor:
        return F.linear(tokens, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name: str, tokens: Tensor) -> Tensor:
        if f"{name}.weight" not in weights:
            return tokens
        return F.layer_norm(tokens, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def head_norm(name: str, x: Tensor) -> Tensor:
        if f"{name}.weight" not in weights:
            return x
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]

    def block(name: str, index: int, tokens: Tensor, skip: Tensor | None = None) -> Tensor:
        of_attention, of_mlp = (1.0, 1.0) if kept is None else kept[:, index, :, None, None].unbind(dim=1)
        if f"{name}.skip_linear.weight" in weights:
            tokens = linear(f"{name}.skip_linear", torch.cat([tokens, skip], dim=-1))
        q, k, v = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", tokens)).chunk(3, dim=-1)
        heads = []
        for h in torch.arange(width).chunk(num_heads):
            q_h, k_h = head_norm(f"{name}.attn.q_norm", q[..., h]), head_norm(f"{name}.attn.k_norm", k[..., h])
            attention = (q_h @ k_h.mT / len(h) ** 0.5).softmax(dim=-1)
            heads.append(attention @ v[..., h])
        tokens = residual * tokens + of_attention * linear(f"{name}.attn.proj", torch.cat(heads, dim=-1))
        return residual * tokens + of_mlp * linear(
            f"{name}.mlp.fc2", F.gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", tokens)))
        )

    frequencies = 10000 ** (-torch.arange(width // 2) / (width // 2))
    time = torch.cat([torch.cos(times[:, None] * frequencies), torch.sin(times[:, None] * frequencies)], dim=1)
    if "time_embed.0.weight" in weights:
        time = linear("time_embed.2", F.silu(linear("time_embed.0", time)))
    patches = F.conv2d(x, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=patch)
    tokens = torch.cat([time[:, None], patches.flatten(2).mT], dim=1)
    if labels is not None:
        tokens = torch.cat([weights["label_emb.weight"][labels][:, None], tokens], dim=1)
    tokens = tokens + weights["pos_embed"]
    depth = len({name.split(".")[1] for name in weights if name.startswith("in_blocks")})
    skips = []
    for index in range(depth):
        tokens = block(f"in_blocks.{index}", index, tokens)
        factor = 1.0 if skip_factors is None else skip_factors[index]
        if "skip_calibration.fc1.weight" in weights:
            hidden = F.relu(linear("skip_calibration.fc1", tokens.mean(dim=2)))
            factor = 1 / (1 + torch.exp(-linear("skip_calibration.fc2", hidden)[:, :, None]))
        skips.append(factor * tokens)
    tokens = block("mid_block", depth, tokens)
    for index in range(depth):
        tokens = block(f"out_blocks.{index}", depth + 1 + index, tokens, skips.pop())
    tokens = linear("decoder_pred", norm("norm", tokens))[:, -(side**2) :]
    image = rearrange(tokens, "B (h w) (p q C) -> B C (h p) (w q)", h=side, p=patch, q=patch)
    if "final_layer.weight" in weights:
        image = F.conv2d(image, weights["final_layer.weight"], weights["final_layer.bias"], padding=1)
    return image
