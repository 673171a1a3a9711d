"""Self-Supervised Implicit Attention (arXiv 2206.07434) as a loss in training only. Experimental.

The abstract, all that we could read, fixes no formula. Our reading of "supervisory signals from higher network layers
to guide lower network layers": the attention weights of a higher block are what a lower one has to foresee. Blocks are
read at attach()'s places. In each stage, a run of places with one channel count N, the last place teaches those before
it; where units are attached, places and stages are theirs, and the features are what a unit returns. In a U-ViT the
middle block teaches the in blocks, by the tokens after each. With x maps (B, N, H, W) or tokens (B, L, N), and
GAP the mean over H and W or over all tokens:

    target      a = sigmoid((y - mean(y)) / sd(y)),  y = GAP(x_last),  over the N channels, without gradient
    foreseen    a_l = sigmoid(W2 relu(W1 GAP(x_l))),  a head of its own for each place l before, W1 N/r x N, W2 N x N/r
    loss        mean over all l of all stages of the mean over images and channels of (a_l - a)^2

The gradient goes through the heads into the lower blocks. The heads are registered on the network that is trained, so
optimizer, average, checkpoints and DDP know them; a pipeline or saved classifier never has them, and in evaluation
nothing is computed for them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dia_diffusion.attention.insertion_points import InsertionHook, Position, group_by_channels, insertion_points
from dia_diffusion.errors import InputError
from dia_diffusion.models.attach import attachment_in
from dia_diffusion.models.uvit import UViT

HEADS = "ssia_heads"
"""What the heads are registered as, and so how their names begin in checkpoints."""


class Guidance:
    """The auxiliary loss of a network's forward passes in training.

    Args:
        model: a UViT, one with attached units, or one whose places attach() finds by itself. It gets the heads, as
            `ssia_heads`, after all it has.
        reduction: r; must divide the widths of the stages.
        seed: of the heads' first weights; the generator of what comes after is left alone.

    Raises:
        InputError: no known places, no stage of two or more, or r not dividing a width.
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
        self.kept: dict[str, Tensor] | None = None  # a dict while a forward pass in training runs
        self.loss: Tensor | None = None
        model.register_forward_pre_hook(self._start)
        for stage in stages:
            for position in stage:
                _Place(position, self).hook(network)
        # Inside the network's own forward, where the heads' gradients are averaged over processes with the others'.
        model.register_forward_hook(self._measure)

    def take(self) -> Tensor:
        """The loss () of the last forward pass, once."""
        assert self.loss is not None, "no forward pass of the network in training"
        loss, self.loss = self.loss, None
        return loss

    def _start(self, model: nn.Module, _: Any) -> None:
        self.kept = {} if model.training else None

    def _measure(self, *_: Any) -> None:
        kept, self.kept = self.kept, None  # what the backward pass runs again isn't kept again
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
            x = features[0] if isinstance(features, tuple) else features  # a UViT's block hands on a state, too
            axes = (2, 3) if x.dim() == 4 else 1
            dtype = torch.promote_types(x.dtype, torch.float32)
            self.guidance.kept[self.position.module] = x.mean(dim=axes, dtype=dtype)
        return features


def attention_target(pooled: Tensor) -> Tensor:
    """Attention weights (B, N) from a higher block's pooled features (B, N): where its channels stand out, detached."""
    pooled = pooled.detach()
    return ((pooled - pooled.mean(dim=1, keepdim=True)) / (pooled.std(dim=1, keepdim=True) + 1e-6)).sigmoid()


def _stages(model: nn.Module) -> tuple[nn.Module, list[tuple[Position, ...]]]:
    """The stages with something to learn, and the module that their names are names in."""
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
            f"`ssia.weight` must be 0 for a {type(model).__name__} without two blocks of one width in a row, the "
            "later of which could teach the earlier"
        )
    return network, stages


def _head(width: int, reduction: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width // reduction), nn.ReLU(), nn.Linear(width // reduction, width))


def without_heads(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A training network's tensors as its pipeline or saved classifier has them."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{HEADS}.")}
