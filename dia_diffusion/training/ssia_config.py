"""The keys of the loss in `training.ssia`, of recipes for `train` and for `classify`."""

import math
from dataclasses import dataclass

from dia_diffusion.errors import InputError


@dataclass
class SsiaConfig:
    """Experimental: a loss in training only, by which higher blocks teach lower ones (arXiv 2206.07434)."""

    weight: float = 0.0
    """Of this loss beside the recipe's own; 0 leaves it out."""
    reduction: int = 4
    """Reduction ratio of the heads that it needs; must divide the widths of the blocks."""

    def check(self) -> None:
        """Raises InputError for a weight that is none; the network decides what `reduction` may be."""
        if not 0 <= self.weight < math.inf:
            raise InputError(f"ssia.weight is {self.weight}; accepted: 0, which is none, or more")
