"""Muon for the hidden matrices and AdamW for all other parameters, in one optimizer."""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dia_diffusion.errors import InputError

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x^3 and x^5 in each iteration."""
ITERATIONS = 5
ADAMW_RMS = 0.2
"""RMS of AdamW's updates at learning rate 1 (arXiv 2502.16982), to which Muon's updates are scaled."""
CONDITIONING = re.compile("norm|emb")
"""Matches names of diffusers' linear layers that act on embedded times and classes."""


def hidden_matrices(model: Any) -> dict[str, Tensor]:
    """Name -> weight of the linear layers in a model's blocks, except the unit's and those on time or class embeddings.

    In a UViT: qkv, proj, fc1, fc2 and skip_linear.
    """
    unit = set() if model.unit is None else set(model.unit.modules())
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "block" in name and not CONDITIONING.search(name) and module not in unit
    }


def muon_groups(model: Any, groups: list[dict[str, Any]], rate: float) -> list[dict[str, Any]]:
    """AdamW's groups without the hidden matrices, followed by separate groups for these with "peak_rate" `rate`.

    Raises:
        InputError: the model has no hidden matrices.
    """
    matrices = hidden_matrices(model)
    if not matrices:
        raise InputError("`optimizer.name` must be adamw for a network without linear maps in its blocks, got muon")
    hidden = set(matrices.values())
    groups = [{**group, "params": [p for p in group["params"] if p not in hidden]} for group in groups]
    for stacked in (1, 3):
        weights = [weight for name, weight in matrices.items() if name.endswith("qkv.weight") == (stacked == 3)]
        if weights:
            groups.append({"params": weights, "peak_rate": rate, "stacked": stacked})
    return groups


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon) for groups with "stacked", AdamW for the others.

    Muon replaces all singular values of a matrix's Nesterov momentum by about 1. The update of an (m, n) matrix is
    scaled by 0.2 sqrt(max(m, n)) to have the RMS of AdamW's updates, so that learning rates and weight decay can be
    shared. Weight decay is decoupled in both. Every process computes the same update.

    As in fused AdamW, a step with the attribute `found_inf` above 0 changes neither weights nor state, and doesn't wait
    for the device. Gradients must be unscaled.

    Args:
        groups: of parameters; "stacked" is the number of matrices that are stacked vertically in each weight, such as
            3 for queries, keys and values; they are orthogonalized separately.
        lr: learning rate.
        betas: AdamW's decay rates.
        weight_decay: times the learning rate, the fraction of a weight that is subtracted in a step.
        momentum: Muon's decay rate.
        dtype: the dtype in which Muon orthogonalizes; None is the weights'.
    """

    _step_supports_amp_scaling = True  # makes GradScaler set found_inf instead of waiting for it

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype | None = None,
    ):
        self.dtype = dtype
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "momentum": momentum}
        # "fused" makes load_state_dict put AdamW's step counts on the device.
        super().__init__(groups, {**defaults, "eps": 1e-8, "stacked": 0, "fused": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Runs one step; parameters without a gradient are unchanged."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["stacked"]:
                by_shape: dict[torch.Size, list[Tensor]] = {}
                for parameter in parameters:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
                for same_shape in by_shape.values():
                    self._muon(group, same_shape)
            elif parameters:
                self._adamw(group, parameters)

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """A step for weights of the same shape, as one batch so that there are few kernel launches."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        weight, old = torch.stack(parameters), torch.stack(buffers)  # (B, rows, columns)
        gradient = torch.stack(_gradients(parameters))

        momentum = old.lerp(gradient, 1 - group["momentum"])
        nesterov = gradient.lerp(momentum, group["momentum"])
        matrices = nesterov.view(-1, weight.shape[1] // group["stacked"], weight.shape[2])
        update = orthogonalize(matrices, self.dtype).view_as(weight)
        scale = ADAMW_RMS * math.sqrt(max(matrices.shape[1:]))
        new = weight * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * scale * update

        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            skip = found_inf > 0
            new, momentum = torch.where(skip, weight, new), torch.where(skip, old, momentum)
        torch._foreach_copy_(parameters, new.unbind())
        torch._foreach_copy_(buffers, momentum.unbind())

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """torch's fused step, with the same state as torch.optim.AdamW."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            _gradients(parameters),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def orthogonalize(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Approximately U V^T (B, m, n) of matrices U S V^T: singular values become 0.68 to 1.21 instead of 1.

    Singular values below 1/500 of a matrix's Frobenius norm end up smaller.

    Args:
        matrices: (B, m, n).
        dtype: the dtype of the Newton-Schulz iterations; None is the matrices'.
    """
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    x = (matrices / norms.clamp(min=1e-7)).to(dtype or matrices.dtype)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # to get the smaller Gram matrix
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
