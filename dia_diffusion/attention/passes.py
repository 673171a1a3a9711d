"""The state along depth of one forward pass of a model with attached units, also when parts are recomputed.

Gradient checkpointing (torch.utils.checkpoint, use_reentrant=False) runs parts of a model a second time in the backward
pass, without the parts before them. Each position in such a part then gets the state of the first time.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dia_diffusion.errors import InputError

NODE_KEY = "dia_diffusion.attention.passes"


class Pass:
    """The state of one forward pass.

    position: the index of the position that runs next.
    state: the state that the unit returned last.
    grad_enabled: whether the pass records gradients.

    Args:
        checkpointing: whether the model has gradient checkpointing enabled.
    """

    def __init__(self, checkpointing: bool):
        self.position = 0
        self.state: Any = None
        self.grad_enabled = torch.is_grad_enabled()
        self.incoming: dict[int, Any] = {}
        # Nodes of the autograd graph are numbered as they are made, so that a node's pass can be found by its number.
        # Reading the number would break a compiled graph in two, and a compiled graph recomputes nothing.
        self.numbered = checkpointing or not torch.compiler.is_compiling()
        self.first_node = self.last_node = next_node() if self.numbered else 0

    def end(self) -> None:
        """Marks the end of the pass: from now on its positions only run to be recomputed."""
        self.state = None
        if self.numbered:
            self.last_node = next_node()

    def keep(self, incoming: Any) -> None:
        """Keeps the state that the next position gets, for its recomputation.

        Raises:
            InputError: a checkpoint in a compiled model that didn't announce it.
        """
        if not self.numbered:
            raise InputError(
                "gradient checkpointing in a compiled model with attached units must be enabled by its "
                "enable_gradient_checkpointing(), got a checkpoint of another kind"
            )

        def leaf(value: Any) -> Any:
            # As a leaf, so that no graph is held; it requires a gradient where the first one did, since that decides
            # which tensors are saved for the backward pass, and they must be the same again.
            return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

        self.incoming[self.position] = tree_map(leaf, incoming)


class Passes:
    """The passes that may be recomputed. Each lives as long as the autograd graph that holds it."""

    def __init__(self) -> None:
        self.kept: weakref.WeakSet[Pass] = weakref.WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Passes":
        return Passes()  # a copied model has no graph of its own yet

    def __reduce__(self) -> Any:
        return Passes, ()

    def hold(self, current: Pass, output: Any) -> None:
        """Ties the lifetime of the pass to the graph of these tensors, if it kept states."""
        if torch.compiler.is_compiling() or not current.incoming:
            return
        self.kept.add(current)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                metadata: Any = tensor.grad_fn.metadata  # a dict, whatever the stubs say
                metadata[NODE_KEY, id(self)] = current

    def incoming_again(self, position: int, name: str) -> Any:
        """The state that a position had in its forward pass, when it is recomputed in the backward pass.

        Raises:
            InputError: no single forward pass fits.
        """
        node = torch._C._current_autograd_node()
        if node is None:
            raise InputError(
                f"{name} has an attached unit and must be called in the forward pass of its whole model, got a call "
                "outside it"
            )
        number = node._sequence_nr()
        matches = [
            kept for kept in self.kept if kept.first_node <= number < kept.last_node and position in kept.incoming
        ]
        if len(matches) != 1:
            raise InputError(
                f"{name} has an attached unit and must be recomputed with use_reentrant=False, in one thread, got a "
                f"backward pass that belongs to {len(matches)} forward passes"
            )
        return matches[0].incoming[position]


@torch.compiler.disable
def next_node() -> int:
    """The number of the next node of the autograd graph that this thread makes."""
    return torch._C._autograd._get_sequence_nr()


def in_checkpoint() -> bool:
    """Whether the code that runs now may be recomputed in the backward pass."""
    if torch.compiler.is_compiling():  # compiled, both are one graph
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
