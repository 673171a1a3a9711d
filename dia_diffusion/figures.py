"""Figures described once, as data. matplotlib renders them to files here, plotly to the HTML page in report/plots.py.

All text is shown as it is: no mathtext, no markup.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import Normalize
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from dia_diffusion.errors import InputError
from dia_diffusion.io import atomic_file

# Okabe and Ito's colors, which color-blind readers can tell apart; the markers help where there is no color at all.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":")
GRAY = "#595959"

LOG_DIGITS = (1, 2, 5)
"""Ticks of each power of ten on a logarithmic axis."""
LOG_FROM = 10
"""The ratio of the largest to the smallest value from which an axis is logarithmic."""

Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """Points, joined by a line and marked; y may be None where there is no point."""

    x: Sequence[float]
    y: Values
    label: str = ""
    """In the legend, unless pale, and beside the mouse; none if empty."""
    style: int = 0
    """Index of its color, marker and dashes, see `style_of`."""
    color: str | None = None
    """Instead of its style's, as #rrggbb."""
    low: Values | None = None
    high: Values | None = None
    """Ends of each point's interval; None where a point has none. A band where all points have one, else bars."""
    bars: bool = False
    """Draws the interval as error bars in any case."""
    lines: bool = True
    markers: bool = True
    pale: bool = False
    """In the background and in no legend, such as a seed's own curve behind the mean."""
    hover: Sequence[str] = ()
    """What each point says on the page besides its value."""

    @property
    def look(self) -> dict[str, Any]:
        """Color, marker and line style of matplotlib."""
        return style_of(self.style) | ({"color": self.color} if self.color else {})

    @property
    def has_band(self) -> bool:
        """Whether the interval is drawn as a band."""
        ends = (self.low, self.high)
        return not self.bars and len(self.x) > 1 and all(end is not None and None not in end for end in ends)

    @property
    def errors(self) -> tuple[list[float], list[float]] | None:
        """Distances from y to the ends of the intervals, 0 where a point has none; None where none is drawn as a bar.

        A band is no bar.
        """
        if self.low is None or self.high is None or self.has_band:
            return None
        ends = list(zip(self.low, self.y, self.high, strict=True))
        if all(None in end for end in ends):
            return None
        return [_minus(y, low) for low, y, _ in ends], [_minus(high, y) for _, y, high in ends]


@dataclass(frozen=True)
class Level:
    """A dashed gray line at a value of an axis."""

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
    """A matrix, its first row on top; column i is at x = i, row j at y = j. NaN is left gray."""

    values: Any
    """(rows, columns), anything that numpy takes."""
    low: float
    high: float
    colors: str = "viridis"
    """Of matplotlib, such as viridis, or RdBu_r for values around 0."""
    numbers: str = ""
    """Format of the numbers in the cells, such as ".2f"; none if empty."""
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
    """An axis; limits that are None are where the data end."""

    label: str = ""
    scale: Literal["linear", "log", "symlog"] = "linear"
    low: float | None = None
    high: float | None = None
    ticks: Mapping[float, str] | Mapping[int, str] | None = None
    form: Literal["plain", "si", "percent"] = "plain"
    """How numbers are written: 50000 as it is, as 50k, or 0.5 as 50%."""
    step_images: int | None = None
    """Of an axis of images seen: images a step. A second axis then counts steps, and points on the page say theirs."""
    grid: bool = True


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    items: Sequence[Item]
    title: str = ""
    x: Axis = field(default_factory=Axis)
    y: Axis = field(default_factory=Axis)
    note: str = ""
    """In the upper right corner."""
    frame: bool = True
    """Whether there are axes around it."""


@dataclass(frozen=True)
class Figure:
    """Panels in rows; None leaves a place empty, and rows may be of different lengths."""

    rows: Sequence[Sequence[Panel | None]]
    size: tuple[float, float] = (6.4, 4.2)
    """Width and height in inches."""
    legend: Literal["panel", "below", "none"] = "panel"
    """One in each panel that has labels, or one for all below them."""
    legend_title: str = ""
    share_x: Literal["none", "col"] = "none"
    share_y: Literal["none", "row", "all"] = "none"
    """Which panels have the same limits; their axis is labeled at the left and the bottom alone."""
    widths: Sequence[float] | None = None
    heights: Sequence[float] | None = None
    """Ratios of columns and rows; all the same if None."""


def style_of(index: int) -> dict[str, Any]:
    """Color, marker and line style of matplotlib; no two of the first 21 indices have the same."""
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
    """Logarithmic for a wide range, else linear from zero, so that a small difference looks small.

    Args:
        label: of the axis.
        values: those that decide on the scale.
        others: those that it must have room for too, such as the floor.
    """
    known, rest = _finite(values), _finite(others)
    if known and min(known) > 0 and max(known) / min(known) >= LOG_FROM:
        return log_axis(label, known + rest)
    low, high = (end([0.0, *known, *rest]) for end in (min, max))
    return Axis(label, low=1.08 * low, high=1.08 * high or None)


def block_axis(names: Sequence[str], label: str = "block") -> Axis:
    """Blocks at 0, 1, ...; of more than 12 every second, third, ... one is named."""
    return Axis(label, ticks={place: names[place] for place in range(0, len(names), -(-len(names) // 12))}, grid=False)


def log_axis(label: str, values: Iterable[float | None]) -> Axis:
    """Logarithmic, with room for all values above zero."""
    shown = [value for value in _finite(values) if value > 0]
    room = (max(shown) / min(shown)) ** 0.05
    return Axis(label, "log", low=min(shown) / room, high=max(shown) * room)


# ---- matplotlib


def check_format(path: str | Path) -> str:
    """The format that a figure file's suffix names.

    Raises:
        InputError: there is no such format.
    """
    file_format, formats = Path(path).suffix.removeprefix("."), FigureCanvasBase.get_supported_filetypes()
    if file_format not in formats:
        raise InputError(f"{path} must have the suffix of a figure format, one of {', '.join(formats)}")
    return file_format


def save_figure(figure: Figure | matplotlib.figure.Figure, path: str | Path, dpi: int = 200) -> None:
    """Writes a figure in the format that its suffix names, whole or not at all."""
    rendered = render(figure) if isinstance(figure, Figure) else figure
    file_format = check_format(path)
    with atomic_file(path) as temporary:
        rendered.savefig(temporary, format=file_format, dpi=dpi)


def render(figure: Figure) -> matplotlib.figure.Figure:
    """The figure in matplotlib."""
    rendered = matplotlib.figure.Figure(figsize=figure.size, layout="constrained")
    columns = max(len(row) for row in figure.rows)
    grid = rendered.subplots(
        len(figure.rows),
        columns,
        squeeze=False,
        sharex=figure.share_x,
        sharey=figure.share_y,
        width_ratios=figure.widths,
        height_ratios=figure.heights,
    )
    panels: list[tuple[Axes, Panel]] = []
    for row, places in zip(figure.rows, grid, strict=True):
        for axes, panel in zip_longest(places, row):
            if panel is None:
                axes.remove()
            else:
                panels.append((axes, panel))
                _draw_panel(axes, panel)
    for axes, panel in panels:  # limits once everything is drawn, since they may be shared
        labeled = figure.share_y == "none" or axes.get_subplotspec().is_first_col()  # type: ignore[union-attr]
        _scale(axes, panel.x, "x", narrow=figure.size[0] / columns < 4.2)
        _scale(axes, panel.y, "y", labeled=labeled)
    if figure.legend == "panel":
        for axes, _ in panels:
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize="medium" if len(panels) == 1 else "small")
    elif figure.legend == "below":
        _draw_legend(rendered, panels, figure.legend_title)
    return rendered


def _draw_panel(axes: Axes, panel: Panel) -> None:
    axes.set_title(_plain(panel.title), fontsize="large" if len(panel.title) <= 40 else "medium")
    if panel.note:
        axes.text(0.97, 0.96, _plain(panel.note), transform=axes.transAxes, ha="right", va="top", fontsize="small")
    if not panel.frame:
        axes.axis("off")
    for item in panel.items:
        _draw(axes, item)


def _draw(axes: Axes, item: Item) -> None:
    match item:
        case Series():
            _draw_series(axes, item)
        case Level(value, label, axis):
            draw = axes.axhline if axis == "y" else axes.axvline
            draw(value, color=GRAY, linestyle="--", linewidth=1.2, label=_plain(label) or None)
        case Bars():
            color = style_of(item.style)["color"]
            axes.bar(item.x, item.heights, item.width, item.bottom, color=color, label=_plain(item.label) or None)
        case Area():
            color = style_of(item.style)["color"]
            edge = {"edgecolor": (color, 1.0), "linewidth": 1} if item.outline else {"linewidth": 0}
            axes.fill(item.x, item.y, facecolor=(color, item.opacity), label=_plain(item.label) or None, **edge)
        case HeatMap():
            _draw_heat_map(axes, item)
        case Text():
            axes.text(item.x, item.y, _plain(item.text), color=item.color, ha="center", va="center", fontsize="small")
        case Picture():
            axes.imshow(item.pixels)


def _draw_series(axes: Axes, series: Series) -> None:
    style = series.look
    y = [math.nan if value is None else value for value in series.y]
    if series.has_band:
        axes.fill_between(series.x, series.low, series.high, color=style["color"], alpha=0.2, linewidth=0)  # type: ignore[arg-type]
    if (errors := series.errors) is not None:
        for x, value, *lengths in zip(series.x, y, *errors, strict=True):
            if any(lengths):
                ends = [[length] for length in lengths]
                axes.errorbar(x, value, ends, color=style["color"], elinewidth=1.2, capsize=3, linestyle="")
    style |= {"markersize": 4, "linewidth": 1.6, "label": _plain(series.label) or None}
    if series.pale:
        style |= {"markersize": 3, "linewidth": 0.7, "alpha": 0.35, "label": None}
    style |= ({} if series.markers else {"marker": ""}) | ({} if series.lines else {"linestyle": ""})
    axes.plot(series.x, y, **style)


def _draw_heat_map(axes: Axes, heat_map: HeatMap) -> None:
    values = np.array(heat_map.values, dtype=float)
    axes.set_facecolor("0.9")
    norm = Normalize(heat_map.low, heat_map.high)
    image = axes.imshow(values, heat_map.colors, norm, aspect="auto", interpolation="nearest")
    if heat_map.bar is not None:
        axes.figure.colorbar(image, ax=axes, pad=0.02, fraction=0.06).set_label(heat_map.bar, fontsize="small")
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True) if heat_map.numbers else ():
        value = values[row, column]
        red, green, blue, _ = image.cmap(image.norm(value))
        color = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
        axes.text(column, row, format(value, heat_map.numbers), color=color, ha="center", va="center", fontsize="small")


def _scale(axes: Axes, axis: Axis, which: Literal["x", "y"], *, labeled: bool = True, narrow: bool = False) -> None:
    own = axes.xaxis if which == "x" else axes.yaxis
    if axis.scale != "linear":
        axes.set(**{f"{which}scale": axis.scale})
        if axis.scale == "log":
            own.set_major_locator(LogLocator(subs=(1,) if narrow else LOG_DIGITS))
        own.set_major_formatter("{x:g}")
        own.set_minor_formatter(NullFormatter())
    if labeled:
        own.set_label_text(_plain(axis.label))
    if axis.low is not None or axis.high is not None:
        axes.set_xlim(axis.low, axis.high) if which == "x" else axes.set_ylim(axis.low, axis.high)
    if axis.ticks is not None:
        longest = max((len(line) for text in axis.ticks.values() for line in text.split("\n")), default=0)
        crowded = which == "x" and longest > 3 and longest * len(axis.ticks) > 50
        turned: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        own.set_ticks(list(axis.ticks), [_plain(text) for text in axis.ticks.values()], **turned)
        own.set_minor_locator(NullLocator())
    elif narrow and axis.scale == "linear":
        own.set_major_locator(MaxNLocator(5))
    if axis.form != "plain":
        own.set_major_formatter(EngFormatter(sep="") if axis.form == "si" else PercentFormatter(1.0, decimals=0))
    if axis.grid:
        axes.grid(axis=which, alpha=0.25, linewidth=0.6)
    if axis.step_images:
        to_steps, to_images = partial(np.multiply, 1 / axis.step_images), partial(np.multiply, axis.step_images)
        steps = axes.secondary_xaxis("top", functions=(to_steps, to_images))
        steps.set_xlabel(f"steps of {axis.step_images} images")
        steps.xaxis.set_major_formatter(EngFormatter(sep=""))
        if narrow:
            steps.xaxis.set_major_locator(MaxNLocator(5))


def _draw_legend(figure: matplotlib.figure.Figure, panels: Sequence[tuple[Axes, Panel]], title: str) -> None:
    """One for all panels, below them; levels come last."""
    drawn = [pair for axes, _ in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    levels = {_plain(item.label) for _, panel in panels for item in panel.items if isinstance(item, Level)}
    entries = {label: handle for handle, label in sorted(drawn, key=lambda pair: pair[1] in levels)}
    widths, width = [0.75 + 0.065 * len(label) for label in entries], figure.get_figwidth()  # in inches
    columns = len(entries) if sum(widths) <= width else max(1, int(width // max(widths)))
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    if entries:
        figure.legend(entries.values(), entries.keys(), title=_plain(title) or None, title_fontsize="medium", **place)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")


def _minus(larger: float | None, smaller: float | None) -> float:
    return 0.0 if larger is None or smaller is None else larger - smaller


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]
