"""The backbones that a recipe's `model.backbone` can name. A module that defines one adds its row."""

from dataclasses import dataclass
from typing import Any

from dia_diffusion.registry import Registry


@dataclass(frozen=True)
class Backbone:
    """A row of BACKBONES.

    The least is a class: `model(**arguments)` with a recipe's `model:` section, an nn.Module that predicts as
    `model(sample, timestep, class_labels, return_dict)`, see UViT.forward, and has the attributes `in_channels`,
    `sample_size`, `num_classes` (None is unconditional, else class `num_classes` is the null label) and `unit` (None
    without one). It should be a ModelMixin and ConfigMixin of diffusers, so that pipelines save and load it.
    """

    model: type[Any]
    """The class. A recipe's keys are the arguments of its signature; this is also what is saved."""
    not_in_recipes: tuple[str, ...] = ()
    """Arguments of the class that a recipe can't set."""
    units_at: str = "in its blocks"
    """Where it has attention units by default, for model cards."""
    network: Any = None
    """The class of diffusers that an AttachedModel holds; None where the model is the network itself."""
    classes_argument: str = "num_classes"
    """The argument of the network that says how many classes it embeds."""
    adds_null_label: bool = False
    """The network embeds a null label after those classes, and needs at least one class. Otherwise the null label is
    counted among them."""

    @property
    def name(self) -> str:
        """The network's class, for people."""
        return (self.network or self.model).__name__


BACKBONES: Registry[Backbone] = Registry("backbone")


def wrapped_networks() -> dict[str, Backbone]:
    """The rows of networks of diffusers, by name."""
    return {name: row for name, row in BACKBONES.items() if row.network is not None}
