"""Parameter counts printed in arXiv 2210.16101, in millions, each with the configuration to count for comparison.

The paper seldom states a module's reduction ratio or whether its linear maps have biases. The values here are chosen to
fit the printed number; where the paper states them (r of DIA-LSTM in Tables XII, XIII and XVI), those are used.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

from dia_diffusion.analysis.parameters import CLASSES
from dia_diffusion.models.cifar_resnet import Layers, cifar_resnet, cifar_resnext, cifar_wrn


@dataclass(frozen=True)
class Cell:
    """A printed count."""

    table: str
    """The table's number in the paper."""
    backbone: str
    """The name that `paper_backbone` takes."""
    model: str
    """The name of the table's row."""
    printed: float
    """Millions, to two decimals."""
    unit: str = "none"
    """The unit's name."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The unit's arguments."""
    stages: tuple[int, ...] = (0, 1, 2)
    """The stages that carry the unit."""


def _individual(**options: Any) -> dict[str, Any]:
    return {"sharing": "individual", **options}


def _se(r: int, bias: bool = True) -> dict[str, Any]:
    return _individual(reduction=r, bias=bias)


TABLE_IV = (
    Cell("IV", "ResNet164", "Org", 1.73),
    Cell("IV", "ResNet164", "SE", 1.93, "se", _se(16)),
    Cell("IV", "ResNet164", "ECA", 1.73, "eca", _individual()),
    Cell("IV", "ResNet164", "CBAM", 1.93, "cbam", _se(16, bias=False)),
    Cell("IV", "ResNet164", "SRM", 1.76, "srm", _individual()),
    # No individual SPA fits: r = 64, the most that 64 channels allow, gives 2.26.
    Cell("IV", "ResNet164", "SPA", 1.96, "spa", {"reduction": 8}),
    Cell("IV", "ResNet164", "SEM", 1.97, "sem", _individual(reduction=16)),
    Cell("IV", "ResNet164", "SPEM", 1.76, "spem", _individual()),
    Cell("IV", "ResNet164", "DIA-LSTM", 1.95, "dia-lstm", {"reduction": 4}),
    Cell("IV", "ResNet164", "DIA-LSTM (Light)", 1.75, "dia-lstm-light", {"reduction": 16}),
    Cell("IV", "WRN52-4", "Org", 12.07),
    Cell("IV", "WRN52-4", "SE", 12.42, "se", _se(4, bias=False)),
    Cell("IV", "WRN52-4", "ECA", 12.07, "eca", _individual()),
    Cell("IV", "WRN52-4", "CBAM", 12.16, "cbam", _se(16, bias=False)),
    Cell("IV", "WRN52-4", "SRM", 12.09, "srm", _individual()),
    Cell("IV", "WRN52-4", "SPA", 13.02, "spa", _se(16, bias=False)),
    Cell("IV", "WRN52-4", "SEM", 12.44, "sem", _individual(reduction=4)),
    Cell("IV", "WRN52-4", "SPEM", 12.09, "spem", _individual()),
    # In the published code, branches end with a BatchNorm where DIA-LSTM is inserted; without it the count is 12.29.
    Cell("IV", "WRN52-4 with branch norm", "DIA-LSTM", 12.30, "dia-lstm", {"reduction": 4}),
    Cell("IV", "WRN52-4 with branch norm", "DIA-LSTM (Light)", 12.11, "dia-lstm-light", {"reduction": 8}),
    Cell("IV", "ResNeXt101,8x32", "Org", 32.14),
    Cell("IV", "ResNeXt101,8x32", "SE", 34.03, "se", _se(4, bias=False)),
    Cell("IV", "ResNeXt101,8x32", "ECA", 32.14, "eca", _individual()),
    Cell("IV", "ResNeXt101,8x32", "CBAM", 32.61, "cbam", _se(16, bias=False)),
    Cell("IV", "ResNeXt101,8x32", "SRM", 32.18, "srm", _individual()),
    Cell("IV", "ResNeXt101,8x32", "SPA", 52.95, "spa", _se(4, bias=False)),
    Cell("IV", "ResNeXt101,8x32", "SEM", 34.09, "sem", _individual(reduction=4)),
    Cell("IV", "ResNeXt101,8x32", "SPEM", 32.18, "spem", _individual()),
    Cell("IV", "ResNeXt101,8x32", "DIA-LSTM", 33.01, "dia-lstm", {"reduction": 4}),
    Cell("IV", "ResNeXt101,8x32", "DIA-LSTM (Light)", 32.24, "dia-lstm-light", {"reduction": 8}),
)

TABLE_XII = tuple(
    Cell("XII", "ResNet164", f"DIA-LSTM, r = {r}", printed, "dia-lstm", {"reduction": r})
    for r, printed in ((1, 2.59), (4, 1.95), (8, 1.84), (16, 1.78))
)

TABLE_XIII = tuple(
    cell
    for depth, se, dia in ((83, 0.99, 1.11), (164, 1.93, 1.95), (245, 2.87, 2.78), (407, 4.74, 4.45))
    for cell in (
        Cell("XIII", f"ResNet{depth}", "SE", se, "se", _se(16)),
        Cell("XIII", f"ResNet{depth}", "DIA-LSTM", dia, "dia-lstm", {"reduction": 4}),
    )
)

TABLE_XIV = (
    Cell("XIV", "ResNet164", "DIA-LSTM, 1 cell", 1.95, "dia-lstm", {"reduction": 4}),
    Cell("XIV", "ResNet164", "DIA-LSTM, 3 cells", 3.33, "dia-lstm", {"reduction": 4, "num_cells": 3}),
)

TABLE_XV = (
    Cell("XV", "ResNet164", "DIA-LSTM but in stage 1", 1.94, "dia-lstm", {"reduction": 4}, (1, 2)),
    Cell("XV", "ResNet164", "DIA-LSTM but in stage 2", 1.90, "dia-lstm", {"reduction": 4}, (0, 2)),
    Cell("XV", "ResNet164", "DIA-LSTM but in stage 3", 1.78, "dia-lstm", {"reduction": 4}, (0, 1)),
)

TABLE_XVI = tuple(
    cell
    for depth, plain, se, dia in (
        (83, 0.88, 0.98, 0.94),
        (164, 1.70, 1.91, 1.76),
        (245, 2.53, 2.83, 2.58),
        (326, 3.35, 3.75, 3.41),
    )
    for cell in (
        Cell("XVI", f"ResNet{depth} without BatchNorms", "Org", plain),
        Cell("XVI", f"ResNet{depth} without BatchNorms", "SE", se, "se", _se(16)),
        Cell("XVI", f"ResNet{depth} without BatchNorms", "DIA-LSTM", dia, "dia-lstm", {"reduction": 16}),
    )
)

PAPER_TABLES: dict[str, tuple[Cell, ...]] = {
    "IV": TABLE_IV,
    "XII": TABLE_XII,
    "XIII": TABLE_XIII,
    "XIV": TABLE_XIV,
    "XV": TABLE_XV,
    "XVI": TABLE_XVI,
}
"""The tables that count parameters."""


@cache
def paper_backbone(name: str) -> nn.Module:
    """The backbone of a `Cell` by name, for CIFAR-100 and without a unit."""
    with torch.device("meta"):
        if name.startswith("WRN52-4"):
            return cifar_wrn(52, 4, CLASSES, Layers("batch", True, branch_norm=name.endswith("with branch norm")))
        plain = Layers("batch", True, branch_norm=False)
        if name == "ResNeXt101,8x32":
            return cifar_resnext(101, 8, 32, CLASSES, plain)
        match = re.fullmatch(r"ResNet(\d+)( without BatchNorms)?", name)
        assert match is not None
        model = cifar_resnet(int(match[1]), CLASSES, plain)
        return without_batch_norms(model) if match[2] else model


def without_batch_norms(model: nn.Module) -> nn.Module:
    """Removes all BatchNorms except those of the shortcuts, without adding biases in their place.

    Table XVI counts this network; removing the shortcuts' BatchNorms too gives 0.001 M less.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Sequential) and not name.endswith("shortcut"):
            for index in reversed(range(len(module))):
                if isinstance(module[index], nn.BatchNorm2d):
                    del module[index]
    return model
