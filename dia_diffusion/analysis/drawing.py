"""What the analyses' figures have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from dia_diffusion.evaluation.curves import COLOURS, MARKERS
from dia_diffusion.io import atomic_file


def style(index: int) -> dict[str, Any]:
    """The colour, marker and width of the line of that number."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4,
        "linewidth": 1.6,
    }


def over_training(axes: Axes) -> None:
    """The lower axis is images seen."""
    axes.set_xlabel("images seen")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(labelleft=True)
    axes.grid(alpha=0.25, linewidth=0.6)


def percent(axes: Axes) -> None:
    """Per cent from below 1 to above 100: linear up to 1, logarithmic from there."""
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=min(0, axes.dataLim.y0))
    axes.yaxis.set_major_formatter("{x:g}")


def block_ticks(axes: Axes, names: Sequence[str], along: str = "x") -> None:
    """Names the blocks at 0, 1, ...; of more than 12 every second, third, ... one."""
    every = -(-len(names) // 12)
    places = range(0, len(names), every)
    labels = [names[place] for place in places]
    if along == "x":
        axes.set_xticks(places, labels, rotation=90 if max(map(len, labels)) > 3 and len(labels) > 5 else 0)
    else:
        axes.set_yticks(places, labels)


def save(figure: Figure, path: str | Path, dpi: int = 160) -> None:
    """Writes a PNG, whole or not at all."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
