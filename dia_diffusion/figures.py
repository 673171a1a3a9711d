"""Figures described once, as data: matplotlib renders them to files, plotly to the HTML page.

All text is shown as it is: no mathtext, no markup.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import Normalize
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from dia_diffusion.errors import InputError
from dia_diffusion.io import atomic_file

# Okabe and Ito's colors, which color-blind readers can tell apart; the markers help where there is no color at all.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":")
GRAY = "#595959"
# plotly's names of these markers and dashes.
SYMBOLS = dict(zip(MARKERS, ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x"), strict=True))
DASH_NAMES = dict(zip(DASHES, ("solid", "dash", "dot"), strict=True))

LOG_FROM = 10
"""The ratio of the largest to the smallest value from which an axis is logarithmic."""
INCHES_PER_ENTRY = 2.4
"""Width of an entry of a legend, such as "dia-lstm-light-identity" with its marker."""

Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """Points, joined by a line and marked; y may be None where there is no point."""

    x: Sequence[float]
    y: Values
    label: str = ""
    """In the legend; none if empty."""
    style: int = 0
    """Index of its color, marker and dashes, see `style_of`."""
    color: str | None = None
    """Instead of its style's."""
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
    """A dashed gray line at a value of the y axis (or the x axis)."""

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
    """A few words at a place."""

    x: float
    y: float
    text: str
    color: str = "black"
    align: Literal["left", "center", "right"] = "center"


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
    ticks: Mapping[float, str] | None = None
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
    """Panels in rows; None leaves a place empty."""

    rows: Sequence[Sequence[Panel | None]]
    size: tuple[float, float] = (6.4, 4.2)
    """Width and height in inches."""
    legend: Literal["panel", "below", "none"] = "panel"
    """One in each panel that has labels, or one for all below them."""
    legend_title: str = ""
    share_x: Literal["none", "col", "all"] = "none"
    share_y: Literal["none", "row", "all"] = "none"
    """Panels with the same limits. Only those at the left are labeled."""
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
    shown = known + rest
    if known and min(known) > 0 and max(known) / min(known) >= LOG_FROM:
        positive = [value for value in shown if value > 0]
        low, high = min(positive), max(positive)
        room = (high / low) ** 0.05
        return Axis(label, "log", low / room, high * room, log_ticks(low / room, high * room))
    low, high = min([0.0, *shown]), max([0.0, *shown])
    return Axis(label, low=low and 1.08 * low, high=1.08 * high or None)


def log_ticks(low: float, high: float) -> dict[float, str]:
    """1, 2 and 5 of each power of ten between the two, or 1 alone if there are more than three powers."""
    digits = (1, 2, 5) if high < 1000 * low else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in digits]
    return {tick: f"{tick:g}" for tick in ticks if low <= tick <= high}


def block_axis(names: Sequence[str], label: str = "block") -> Axis:
    """Blocks at 0, 1, ...; of more than 12 every second, third, ... one is named."""
    return Axis(label, ticks={place: names[place] for place in range(0, len(names), -(-len(names) // 12))}, grid=False)


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


def save_figure(figure: "Figure | matplotlib.figure.Figure", path: str | Path, dpi: int = 200) -> None:
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
        for axes, panel in zip(places, [*row, *[None] * (columns - len(row))], strict=True):
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
        _draw_legend(rendered, [axes for axes, _ in panels], figure.legend_title)
    return rendered


def _draw_panel(axes: Axes, panel: Panel) -> None:
    axes.set_title(_plain(panel.title), fontsize="medium" if "\n" in panel.title or len(panel.title) > 40 else None)
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
            axes.text(item.x, item.y, _plain(item.text), color=item.color, ha=item.align, va="center", fontsize="small")
        case Picture():
            axes.imshow(item.pixels)


def _draw_series(axes: Axes, series: Series) -> None:
    style = style_of(series.style) | ({"color": series.color} if series.color else {})
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
        own.set_major_formatter("{x:g}")
        own.set_minor_formatter(NullFormatter())
    if labeled:
        own.set_label_text(_plain(axis.label))
    if axis.low is not None or axis.high is not None:
        axes.set_xlim(axis.low, axis.high) if which == "x" else axes.set_ylim(axis.low, axis.high)
    if axis.ticks is not None:
        longest = max(map(len, axis.ticks.values()), default=0)
        turned: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
        turned = turned if which == "x" and longest > 3 and longest * len(axis.ticks) > 50 else {}
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


def _draw_legend(figure: matplotlib.figure.Figure, panels: Sequence[Axes], title: str) -> None:
    """One for all panels, below them."""
    entries = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    columns = max(1, min(len(entries), int(figure.get_figwidth() // INCHES_PER_ENTRY), 4))
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    if entries:
        figure.legend(entries.values(), entries.keys(), title=title or None, title_fontsize="medium", **place)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")


# ---- plotly


def to_plotly(panels: Sequence[Panel], height: int = 400) -> dict[str, Any]:
    """Data and layout of plotly for panels below each other over one x axis; of these, series and levels are drawn.

    height: of all panels together, in pixels.
    """
    x = panels[-1].x
    layout: dict[str, Any] = PAGE_LAYOUT | {
        "height": height,
        "xaxis": _plotly_axis(x) | {"anchor": _name(len(panels) - 1)},
    }
    layout["shapes"], layout["annotations"], traces = [], [], []
    between = 0.08 if len(panels) > 1 else 0
    share = (1 - between * (len(panels) - 1)) / len(panels)
    for index, panel in enumerate(panels):
        y, top = _name(index), 1 - index * (share + between)
        layout[y.replace("y", "yaxis")] = _plotly_axis(panel.y) | {
            "domain": [max(0.0, top - share), top],
            "title_standoff": 8,
        }
        for item in panel.items:
            match item:
                case Series():
                    drawn = [*(_plotly_band(item) if item.has_band else ()), _plotly_series(item, panel.x.step_images)]
                    traces += [trace | {"yaxis": y} for trace in drawn]
                case Level(value, label, "y"):
                    line = {"color": GRAY, "dash": "dash", "width": 1.2}
                    shape = {"type": "line", "x0": 0, "x1": 1, "y0": value, "y1": value, "line": line}
                    shape |= {"xref": "x domain", "yref": y, "name": _escape(label)}
                    layout["shapes"].append(shape | {"showlegend": bool(label)})
                case _:
                    raise TypeError(f"the page has no {type(item).__name__}")
        if panel.note:
            place = {"xref": "x domain", "yref": f"{y} domain", "x": 1, "y": 1, "align": "right"}
            layout["annotations"].append(
                {"text": _escape(panel.note).replace("\n", "<br>"), "showarrow": False, **place}
            )
    layout["showlegend"] = any(trace.get("showlegend", True) for trace in traces[1:]) or bool(layout["shapes"])
    layout["margin"] = {"l": 64, "r": 12, "t": 34 if layout["showlegend"] else 12, "b": 48}
    # Bands first, so that no band covers a line.
    return {"data": sorted(traces, key=lambda trace: trace["line"]["width"] > 0), "layout": layout}


def _name(index: int) -> str:
    """plotly's name of a panel's y axis."""
    return f"y{index + 1}" if index else "y"


PAGE_LAYOUT: dict[str, Any] = {
    "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "hovermode": "x unified",
    "hoversubplots": "axis",
    "modebar": {"bgcolor": "rgba(0,0,0,0)"},
    "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal"},
}
"""The page's style sheet colors text and grid, for light and dark."""


def _plotly_axis(axis: Axis) -> dict[str, Any]:
    position = math.log10 if axis.scale == "log" else float
    low, high = (None if end is None else position(end) for end in (axis.low, axis.high))
    described: dict[str, Any] = {
        "title": {"text": _escape(axis.label)},
        "type": axis.scale,
        "range": [low, high],
        "autorangeoptions": {"include": 0} if high is None and low == 0 else {},
        "tickformat": {"plain": "", "si": "~s", "percent": ".0%"}[axis.form],
        "hoverformat": "," if axis.form == "si" else "",
        "exponentformat": "power",
        "showgrid": axis.grid,
        "gridcolor": "#d9dcdf",
        "linecolor": "#59616a",
        "showline": axis.form == "si" or axis.ticks is not None,
        "zeroline": False,
    }
    if axis.ticks is not None:
        described |= {"tickvals": list(axis.ticks), "ticktext": [_escape(text) for text in axis.ticks.values()]}
    return described


def _plotly_series(series: Series, step_images: int | None) -> dict[str, Any]:
    style = style_of(series.style)
    hover = series.hover or [f"step {round(x / step_images):,}" for x in series.x if step_images]
    trace: dict[str, Any] = {
        "type": "scatter",
        "x": list(series.x),
        "y": list(series.y),
        "name": _escape(series.label),
        "mode": "+".join(["lines"] * series.lines + ["markers"] * series.markers),
        "line": {"color": style["color"], "dash": DASH_NAMES[style["linestyle"]], "width": 0.8 if series.pale else 1.8},
        "marker": {"symbol": SYMBOLS[style["marker"]], "size": 4 if series.pale else 7},
        "opacity": 0.35 if series.pale else 1,
        "hovertemplate": "%{y:.4g} (%{text})" if hover else "%{y:.4g}",
        "text": [_escape(text) for text in hover],
    }
    if series.pale:
        trace |= {"showlegend": False} | ({} if series.hover else {"hoverinfo": "skip", "hovertemplate": None})
    if (errors := series.errors) is not None:
        trace["error_y"] = {"type": "data", "symmetric": False, "arrayminus": errors[0], "array": errors[1]}
    return trace


def _plotly_band(series: Series) -> list[dict[str, Any]]:
    """The interval as an area behind the line."""
    red, green, blue = (int(style_of(series.style)["color"][place : place + 2], 16) for place in (1, 3, 5))
    shared: dict[str, Any] = {"type": "scatter", "x": list(series.x), "mode": "lines", "line": {"width": 0}}
    shared |= {"showlegend": False, "hoverinfo": "skip"}
    area = {"fill": "tonexty", "fillcolor": f"rgba({red}, {green}, {blue}, 0.22)"}
    return [shared | {"y": list(series.low or ())}, shared | {"y": list(series.high or ())} | area]


def _escape(text: str) -> str:
    """plotly takes some tags for markup; it shows entities as the characters that they stand for."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _minus(larger: float | None, smaller: float | None) -> float:
    return 0.0 if larger is None or smaller is None else larger - smaller


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]
