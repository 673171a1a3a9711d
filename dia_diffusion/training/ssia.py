"""Self-Supervised Implicit Attention (arXiv 2206.07434) as a loss in training only. Experimental.

The abstract, all that we could read, fixes no formula. Our reading of "supervisory signals from higher network layers
to guide lower network layers": the attention weights of a higher block are what a lower one has to foresee. In a U-ViT
the higher block is the middle one and the lower ones are the in blocks, with tokens x (B, L, N) after a block, GAP the
mean over tokens:

    target      a = sigmoid((y - mean(y)) / sd(y)),  y = GAP(x_mid),  over the N channels, without gradient
    foreseen    a_l = sigmoid(W2 relu(W1 GAP(x_l))),  a head of its own for each in block l, W1 N/r x N, W2 N x N/r
    loss        mean over l, images and channels of (a_l - a)^2

The gradient goes through the heads into the in blocks. The heads are registered on the network that is trained, so
optimizer, average and checkpoints know them; a pipeline's network never has them and computes nothing for them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dia_diffusion.errors import InputError
from dia_diffusion.models.uvit import UViT

HEADS = "ssia_heads"
"""What the heads are registered as, and so how their names begin in checkpoints."""


class Guidance:
    """The auxiliary loss of a UViT's forward passes.

    Args:
        model: gets the heads, as `ssia_heads`, after all it has.
        reduction: r; must divide the width.
        seed: of the heads' first weights; the generator of what comes after is left alone.

    Raises:
        InputError: no UViT, one without in blocks, or r not dividing its width.
    """

    def __init__(self, model: nn.Module, reduction: int, seed: int):
        if not isinstance(model, UViT) or not len(model.in_blocks):
            raise InputError(
                f"ssia.weight is above 0 for a {type(model).__name__}; accepted: a UViT with in blocks, or 0"
            )
        width = model.hidden_size
        if reduction < 1 or width % reduction:
            raise InputError(f"ssia.reduction is {reduction}; accepted: what divides model.hidden_size {width}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = nn.ModuleList(_head(width, reduction) for _ in model.in_blocks)
        model.add_module(HEADS, heads)
        self.heads, self.kept = heads, dict[int, Tensor]()
        self.loss: Tensor | None = None
        for index, block in enumerate((*model.in_blocks, model.mid_block)):
            block.register_forward_hook(self._keep(index))
        # Inside the network's own forward, where the heads' gradients are averaged over processes with the others'.
        model.register_forward_hook(self._measure)

    def take(self) -> Tensor:
        """The loss () of the last forward pass, once."""
        assert self.loss is not None, "no forward pass of the network in training"
        loss, self.loss = self.loss, None
        return loss

    def _keep(self, index: int) -> Any:
        def keep(block: nn.Module, _: Any, output: tuple[Tensor, Any]) -> None:
            if block.training:
                self.kept[index] = output[0].mean(dim=1, dtype=torch.float32)  # (B, N)

        return keep

    def _measure(self, model: nn.Module, *_: Any) -> None:
        if not model.training:
            return
        kept, self.kept = self.kept, {}
        with torch.autocast(kept[0].device.type, enabled=False):
            target = attention_target(kept.pop(len(self.heads)))
            errors = [(head(kept[index]).sigmoid() - target).square().mean() for index, head in enumerate(self.heads)]
            self.loss = torch.stack(errors).mean()


def attention_target(pooled: Tensor) -> Tensor:
    """Attention weights (B, N) from a higher block's pooled features (B, N): where its channels stand out, detached."""
    pooled = pooled.detach()
    return ((pooled - pooled.mean(dim=1, keepdim=True)) / (pooled.std(dim=1, keepdim=True) + 1e-6)).sigmoid()


def _head(width: int, reduction: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width // reduction), nn.ReLU(), nn.Linear(width // reduction, width))


def without_heads(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A training network's tensors as its pipeline has them."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{HEADS}.")}
