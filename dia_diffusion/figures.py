"""Figures described as data.

plotting.py renders them to files with matplotlib, report/plots.py to the HTML page with plotly. Text is shown verbatim:
no mathtext, no markup.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

# Okabe and Ito's colors, which color-blind readers can tell apart; the markers help where there is no color at all.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":")
GRAY = "#595959"

LOG_DIGITS = (1, 2, 5)
"""Ticks of each power of ten on a logarithmic axis."""
LOG_FROM = 10
"""An axis is logarithmic if the ratio of the largest to the smallest value is at least this."""

Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """Points with markers, joined by a line; y may be None where there is no point."""

    x: Sequence[float]
    y: Values
    label: str = ""
    """Shown in the legend, unless pale, and on hover; empty shows none."""
    style: int = 0
    """Index of its color, marker and dashes; see `style_of`."""
    color: str | None = None
    """Replaces the style's color, as #rrggbb."""
    low: Values | None = None
    high: Values | None = None
    """Ends of each point's interval; None where a point has none. A band if all points have one, else error bars."""
    bars: bool = False
    """Always draws the interval as error bars."""
    lines: bool = True
    markers: bool = True
    pale: bool = False
    """In the background and not in the legend, such as the curve of a single seed behind the mean."""
    hover: Sequence[str] = ()
    """What the page shows on hover in addition to a point's value."""

    @property
    def look(self) -> dict[str, Any]:
        """matplotlib's color, marker and line style."""
        return style_of(self.style) | ({"color": self.color} if self.color else {})

    @property
    def has_band(self) -> bool:
        """Whether the interval is drawn as a band."""
        ends = (self.low, self.high)
        return not self.bars and len(self.x) > 1 and all(end is not None and None not in end for end in ends)

    @property
    def errors(self) -> tuple[list[float], list[float]] | None:
        """Distances from y to the ends of the intervals, 0 where a point has none; None if no error bars are drawn.

        A band doesn't count as error bars.
        """
        if self.low is None or self.high is None or self.has_band:
            return None
        ends = list(zip(self.low, self.y, self.high, strict=True))
        if all(None in end for end in ends):
            return None
        return [_minus(y, low) for low, y, _ in ends], [_minus(high, y) for _, y, high in ends]


@dataclass(frozen=True)
class Level:
    """A dashed gray line at one value of an axis."""

    value: float
    label: str = ""
    axis: Literal["x", "y"] = "y"


@dataclass(frozen=True)
class Bars:
    """Bars on the x axis; `bottom` stacks them."""

    x: Sequence[float]
    heights: Sequence[float]
    label: str = ""
    style: int = 0
    bottom: Sequence[float] | None = None
    width: float = 0.85


@dataclass(frozen=True)
class Area:
    """A filled polygon, such as a histogram or a violin."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    style: int = 0
    opacity: float = 0.4
    outline: bool = False


@dataclass(frozen=True)
class HeatMap:
    """A matrix with its first row on top; column i is at x = i, row j at y = j. NaN cells stay gray."""

    values: Any
    """(rows, columns), anything that numpy accepts."""
    low: float
    high: float
    colors: str = "viridis"
    """A matplotlib colormap, such as viridis, or RdBu_r for values around 0."""
    numbers: str = ""
    """Format of the numbers in the cells, such as ".2f"; empty shows none."""
    bar: str | None = None
    """Label of a color bar beside the panel; no bar if None."""


@dataclass(frozen=True)
class Text:
    """A few words, centered at a place."""

    x: float
    y: float
    text: str
    color: str = "black"


@dataclass(frozen=True)
class Picture:
    """An image that fills a panel."""

    pixels: Any
    """(height, width) or (height, width, 3), uint8."""


Item = Series | Level | Bars | Area | HeatMap | Text | Picture


@dataclass(frozen=True)
class Axis:
    """An axis; a limit of None is where the data ends."""

    label: str = ""
    scale: Literal["linear", "log", "symlog"] = "linear"
    low: float | None = None
    high: float | None = None
    ticks: Mapping[float, str] | Mapping[int, str] | None = None
    form: Literal["plain", "si", "percent"] = "plain"
    """How numbers are written: 50000 as is, 50000 as 50k, or 0.5 as 50%."""
    step_images: int | None = None
    """Images per step, for an axis of images seen. A second axis then counts steps, and the page shows each point's."""
    grid: bool = True


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    items: Sequence[Item]
    title: str = ""
    x: Axis = field(default_factory=Axis)
    y: Axis = field(default_factory=Axis)
    note: str = ""
    """Text in the upper right corner."""
    frame: bool = True
    """Whether axes are drawn around it."""


@dataclass(frozen=True)
class Figure:
    """Panels in rows; None leaves a place empty, and rows may be of different lengths."""

    rows: Sequence[Sequence[Panel | None]]
    size: tuple[float, float] = (6.4, 4.2)
    """Width and height in inches."""
    legend: Literal["panel", "below", "none"] = "panel"
    """A legend in each panel that has labels, or one for all below them."""
    legend_title: str = ""
    share_x: Literal["none", "col"] = "none"
    share_y: Literal["none", "row", "all"] = "none"
    """Which panels share limits; a shared axis is labeled only at the left and the bottom."""
    widths: Sequence[float] | None = None
    heights: Sequence[float] | None = None
    """Ratios of columns and rows; all the same if None."""


def style_of(index: int) -> dict[str, Any]:
    """matplotlib's color, marker and line style; the first 21 indices all differ."""
    turn = index // len(COLORS)
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[(index + turn) % len(MARKERS)],
        "linestyle": DASHES[turn % len(DASHES)],
    }


def images_axis(batch_sizes: Iterable[int | None] = ()) -> Axis:
    """Images seen from zero, with steps on a second axis if all runs have the same batch size."""
    sizes = set(batch_sizes)
    return Axis("images seen", low=0, form="si", step_images=sizes.pop() if len(sizes) == 1 else None)


def value_axis(label: str, values: Iterable[float | None], others: Iterable[float | None] = ()) -> Axis:
    """An axis that is logarithmic for a wide range, else linear from zero, so that a small difference looks small.

    Args:
        label: of the axis.
        values: the values that decide on the scale.
        others: further values that must fit, such as the floor.
    """
    known, rest = _finite(values), _finite(others)
    if known and min(known) > 0 and max(known) / min(known) >= LOG_FROM:
        return log_axis(label, known + rest)
    low, high = (end([0.0, *known, *rest]) for end in (min, max))
    return Axis(label, low=1.08 * low, high=1.08 * high or None)


def block_axis(names: Sequence[str], label: str = "block") -> Axis:
    """Blocks at 0, 1, ...; with more than 12, only every second, third, ... one is named."""
    return Axis(label, ticks={place: names[place] for place in range(0, len(names), -(-len(names) // 12))}, grid=False)


def log_axis(label: str, values: Iterable[float | None]) -> Axis:
    """A logarithmic axis with room for all values above zero."""
    shown = [value for value in _finite(values) if value > 0]
    room = (max(shown) / min(shown)) ** 0.05
    return Axis(label, "log", low=min(shown) / room, high=max(shown) * room)


def _minus(larger: float | None, smaller: float | None) -> float:
    return 0.0 if larger is None or smaller is None else larger - smaller


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]
