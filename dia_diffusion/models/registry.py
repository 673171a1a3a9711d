"""The backbones that a recipe's `model.backbone` can name. The module that defines a backbone registers it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dia_diffusion.registry import Registry


@dataclass(frozen=True)
class Backbone:
    """A row of BACKBONES.

    Only a class is required: an nn.Module, built as `model(**arguments)` from a recipe's `model:` section, called as
    `model(sample, timestep, class_labels, return_dict)` (see UViT.forward), with the attributes `in_channels`,
    `sample_size`, `num_classes` (None is unconditional, else label `num_classes` is the null label) and `unit` (None
    without one). It should be a diffusers ModelMixin and ConfigMixin, so that pipelines can save and load it.
    """

    model: type[Any]
    """The class, which is also the one that is saved. A recipe's keys are the arguments of its signature."""
    not_in_recipes: tuple[str, ...] = ()
    """Arguments of the class that a recipe can't set."""
    units_at: str = "in its blocks"
    """Default place of its attention units, for model cards."""
    network: Any = None
    """The diffusers class that an AttachedModel wraps; None if the model is itself the network."""
    classes_argument: str = "num_classes"
    """The network's argument for the number of classes that it embeds."""
    adds_null_label: bool = False
    """The network adds a null label after those classes, and needs at least one class. Otherwise their number includes
    the null label."""
    size_multiple: Callable[[Any], int] = lambda network: 1
    """The network -> the number that its images' sides must be multiples of."""

    @property
    def name(self) -> str:
        """The name of the network's class, for messages."""
        return (self.network or self.model).__name__


BACKBONES: Registry[Backbone] = Registry("backbone")


def wrapped_networks() -> dict[str, Backbone]:
    """The rows that wrap diffusers networks, by name."""
    return {name: row for name, row in BACKBONES.items() if row.network is not None}
