"""One forward pass of a model with attached units: the state along depth, also when parts are computed again.

Gradient checkpointing (torch.utils.checkpoint, use_reentrant=False) runs parts of a model a second time in the backward
pass, without the parts before them. Each position in such a part then takes the state that it was given the first time.
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
    state: what the unit returned last.
    grad_enabled: whether the pass is one with gradients.

    Args:
        checkpointing: whether the model says that it computes parts again.
    """

    def __init__(self, checkpointing: bool):
        self.position = 0
        self.state: Any = None
        self.grad_enabled = torch.is_grad_enabled()
        self.incoming: dict[int, Any] = {}
        # Nodes of the autograd graph are numbered as they are made, which tells later whose a node is. Reading the
        # number breaks a compiled graph in two, and a whole one computes nothing again.
        self.numbered = checkpointing or not torch.compiler.is_compiling()
        self.first_node = self.last_node = next_node() if self.numbered else 0

    def end(self) -> None:
        """No position runs in this pass any more, other than again."""
        self.state = None
        if self.numbered:
            self.last_node = next_node()

    def keep(self, incoming: Any) -> None:
        """Keeps the state that the next position is given.

        Raises:
            InputError: a compiled pass that didn't expect to need it.
        """
        if not self.numbered:
            raise InputError(
                "a checkpoint within a compiled model with attached units; accepted: gradient checkpointing by the "
                "model's enable_gradient_checkpointing(), or a model that isn't compiled"
            )

        def leaf(value: Any) -> Any:
            # As a leaf, so that no graph is held; it requires a gradient where the first one did, since that decides
            # which tensors are saved for the backward pass, and they must be the same again.
            return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

        self.incoming[self.position] = tree_map(leaf, incoming)


class Passes:
    """The passes whose parts may be computed again. Each lives as long as the autograd graph it was held by."""

    def __init__(self) -> None:
        self.kept: weakref.WeakSet[Pass] = weakref.WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Passes":
        return Passes()  # a copied model has no graph of its own yet

    def __reduce__(self) -> Any:
        return Passes, ()

    def hold(self, current: Pass, output: Any) -> None:
        """Lets the graph of these tensors hold the pass, where it has states to take again."""
        if torch.compiler.is_compiling() or not current.incoming:
            return
        self.kept.add(current)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                metadata: Any = tensor.grad_fn.metadata  # a dict, whatever the stubs say
                metadata[NODE_KEY, id(self)] = current

    def incoming_again(self, position: int, name: str) -> Any:
        """The state that a position, which runs outside of a forward pass, was given in the pass it belongs to.

        Raises:
            InputError: it belongs to none.
        """
        node = torch._C._current_autograd_node()
        if node is None:
            raise InputError(
                f"{name} has an attached unit and was called outside the forward pass of the model that attach() was "
                "given; accepted: calls of the whole model"
            )
        number = node._sequence_nr()
        found = [kept for kept in self.kept if kept.first_node <= number < kept.last_node and position in kept.incoming]
        if len(found) != 1:
            raise InputError(
                f"{name} has an attached unit and runs again in a backward pass that belongs to {len(found)} forward "
                "passes; accepted: gradient checkpointing with use_reentrant=False, in one thread"
            )
        return found[0].incoming[position]


@torch.compiler.disable
def next_node() -> int:
    """The number of the next node of the autograd graph that this thread makes."""
    return torch._C._autograd._get_sequence_nr()


def in_checkpoint() -> bool:
    """Whether what runs now may run again in the backward pass."""
    if torch.compiler.is_compiling():  # compiled, both are one graph
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
