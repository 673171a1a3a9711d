"""Self-Supervised Implicit Attention (arXiv 2206.07434) as a training-only loss. Experimental.

We could read only the abstract, which gives no formula. Our reading of "supervisory signals from higher network layers
to guide lower network layers": lower blocks have to predict the attention weights of a higher block. Blocks are read at
attach()'s insertion points. In each stage, a run of points with the same channel count N, the last point teaches those
before it. With attached units, points and stages are the units', and the features are the units' outputs. In a U-ViT
the middle block teaches the in blocks, and the features are each block's output tokens. With x maps (B, N, H, W) or
tokens (B, L, N), and GAP the mean over H and W or over all tokens:

    target      a = sigmoid((y - mean(y)) / sd(y)),  y = GAP(x_last),  over the N channels, without gradient
    prediction  a_l = sigmoid(W2 relu(W1 GAP(x_l))),  a separate head for each earlier point l, W1 N/r x N, W2 N x N/r
    loss        mean over all l of all stages of the mean over images and channels of (a_l - a)^2

The gradient flows through the heads into the lower blocks. The heads are registered on the trained network, so the
optimizer, average, checkpoints and DDP include them; a pipeline or saved classifier never has them, and evaluation
computes nothing for them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dia_diffusion.attention.insertion_points import InsertionHook, Position, group_by_channels, insertion_points
from dia_diffusion.errors import InputError
from dia_diffusion.models.attach import attachment_in
from dia_diffusion.models.uvit import UViT

HEADS = "ssia_heads"
"""The heads' name in the network, and therefore their prefix in checkpoints."""


class Guidance:
    """The auxiliary loss of a network's forward passes in training.

    Args:
        model: a UViT, a model with attached units, or one for which attach() knows insertion points. The heads are
            registered last in it, as `ssia_heads`.
        reduction: r; must divide the widths of the stages.
        seed: of the heads' initial weights; torch's generator is unchanged afterwards.

    Raises:
        InputError: no known insertion points, no stage of two or more, or a width that r doesn't divide.
    """

    def __init__(self, model: nn.Module, reduction: int, seed: int):
        network, stages = _stages(model)
        widths = [stage[0].channels or 0 for stage in stages]
        if reduction < 1 or any(width % reduction for width in widths):
            each = ", ".join(str(width) for width in sorted(set(widths)))
            raise InputError(f"`ssia.reduction` must divide the blocks' widths, {each}, got {reduction}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = [_head(width, reduction) for width, stage in zip(widths, stages, strict=True) for _ in stage[1:]]
        self.heads, self.stages = nn.ModuleList(heads), stages
        model.add_module(HEADS, self.heads)
        self.kept: dict[str, Tensor] | None = None  # a dict during a forward pass in training
        self.loss: Tensor | None = None
        model.register_forward_pre_hook(self._start)
        for stage in stages:
            for position in stage:
                _Place(position, self).hook(network)
        # Within the network's forward pass, so that DDP averages the heads' gradients with the others.
        model.register_forward_hook(self._measure)

    def take(self) -> Tensor:
        """The loss () of the last forward pass; can be called once per pass."""
        assert self.loss is not None, "no forward pass of the network in training"
        loss, self.loss = self.loss, None
        return loss

    def _start(self, model: nn.Module, _: Any) -> None:
        self.kept = {} if model.training else None

    def _measure(self, *_: Any) -> None:
        kept, self.kept = self.kept, None  # recomputation in the backward pass must not store features
        if kept is None:
            return
        heads, errors = iter(self.heads), []
        for stage in self.stages:
            *lower, last = [kept[position.module] for position in stage]
            with torch.autocast(last.device.type, enabled=False):
                target = attention_target(last)
                errors += [(next(heads)(pooled).sigmoid() - target).square().mean() for pooled in lower]
        self.loss = torch.stack(errors).mean()


class _Place(InsertionHook):
    """Keeps the pooled features (B, N) of a forward pass in training."""

    def __init__(self, position: Position, guidance: Guidance):
        super().__init__(position)
        self.guidance = guidance

    def take(self, features: Any) -> Any:
        if self.guidance.kept is not None:
            x = features[0] if isinstance(features, tuple) else features  # a UViT block also returns a state
            axes = (2, 3) if x.dim() == 4 else 1
            dtype = torch.promote_types(x.dtype, torch.float32)
            self.guidance.kept[self.position.module] = x.mean(dim=axes, dtype=dtype)
        return features


def attention_target(pooled: Tensor) -> Tensor:
    """Attention weights (B, N) from a higher block's pooled features (B, N): their standardized sigmoid, detached."""
    pooled = pooled.detach()
    return ((pooled - pooled.mean(dim=1, keepdim=True)) / (pooled.std(dim=1, keepdim=True) + 1e-6)).sigmoid()


def _stages(model: nn.Module) -> tuple[nn.Module, list[tuple[Position, ...]]]:
    """The stages with two or more positions, and the module that contains the named modules."""
    network, attachment = model, attachment_in(model)
    if isinstance(model, UViT):
        names = [*(f"in_blocks.{index}" for index in range(len(model.in_blocks))), "mid_block"]
        stages = [tuple(Position(name, channels=model.hidden_size) for name in names)]
    elif attachment is not None:
        network, stages = attachment.model, [stage.positions for stage in attachment.stages]
    else:
        try:
            stages = group_by_channels(insertion_points(model))
        except InputError:
            raise InputError(
                f"`ssia.weight` must be 0 for a {type(model).__name__}, whose insertion points attach() doesn't know"
            ) from None
    stages = [stage for stage in stages if len(stage) > 1]
    if not stages:
        raise InputError(
            f"`ssia.weight` must be 0 for a {type(model).__name__} without two consecutive blocks of the same width"
        )
    return network, stages


def _head(width: int, reduction: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width // reduction), nn.ReLU(), nn.Linear(width // reduction, width))


def without_heads(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's tensors without the heads, as in its pipeline or saved classifier."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{HEADS}.")}
